"""Where the time of training steps went, read from the trace of torch's profiler: host and device, phase by phase.

Host: every instant of a step belongs to the innermost phase the training thread was in, or to "other". Of backward and
optimizer, "reduce" takes the instants in which a collective was under way and that thread computed nothing.

Device: a kernel, a copy or a fill belongs to the phase in which it was launched, whatever thread launched it; copies
and fills only while no kernel computes, "reduce" is when only collectives run, and "idle" when nothing runs.
"""

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from varscale.engine.phases import PHASES

OTHER, IDLE, REDUCE = "other", "idle", "reduce"
REDUCED = ("backward", "optimizer")  # phases whose collectives are told apart
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the trace
MOST_OPERATORS = 10

Spans = list[tuple[float, float]]  # sorted, apart from each other; microseconds


class Segment(NamedTuple):
    """A part of the training thread's time, in microseconds."""

    start: float
    end: float
    phase: str


def read_trace(path: Path) -> list[dict]:
    """The events of a trace that last: those with "ts" and "dur", in microseconds."""
    with gzip.open(path, "rt") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def analyse(events: Sequence[dict]) -> dict:
    """What the steps of a trace came to on average, as `profile.json` holds it.

    steps: how many were recorded. step_ms: their mean. host: milliseconds a step by phase, which add up to it. device:
    likewise, where it did anything, with "idle", adding up to device_step_ms. operators: those that take the most time
    by themselves, on the device where there is one: {"name", "calls" a step, "ms" a step}.

    Raises ValueError where there is not one whole step.
    """
    steps = _steps(events)
    if not steps:
        raise ValueError("the trace holds no whole step")
    thread = _thread(steps[0])
    segments = [part for step in steps for part in _segments(step, _phases(events, thread))]
    host: dict[str, float] = defaultdict(float)
    for part in _with_reductions(segments, events, thread):
        host[part.phase] += part.end - part.start
    per_step = 1e-3 / len(steps)
    found = {"steps": len(steps), "step_ms": sum(host.values()) * per_step, "host": _rows(host, per_step)}
    kernels = _kernels(events, segments)
    if kernels:
        device = _device(kernels)
        found |= {"device_step_ms": sum(device.values()) * per_step, "device": _rows(device, per_step)}
    return found | {"operators": _operators(events, segments, kernels, per_step)}


def _rows(microseconds: dict[str, float], scale: float) -> dict[str, float]:
    order = (*PHASES, OTHER, IDLE)
    return {phase: microseconds[phase] * scale for phase in order if microseconds.get(phase)}


def _thread(event: dict) -> tuple:
    return event["pid"], event["tid"]


def _end(event: dict) -> float:
    return event["ts"] + event["dur"]


def _annotations(events: Iterable[dict], wanted: Callable[[str], bool]) -> list[dict]:
    return [event for event in events if event.get("cat") == "user_annotation" and wanted(event["name"])]


def _steps(events: Sequence[dict]) -> list[dict]:
    """The profiler's steps; the last one of a run that ended early is a stump without an update."""
    updates = _annotations(events, "optimizer".__eq__)
    steps = sorted(_annotations(events, lambda name: name.startswith("ProfilerStep#")), key=lambda step: step["ts"])
    return [step for step in steps if any(step["ts"] <= update["ts"] < _end(step) for update in updates)]


def _phases(events: Sequence[dict], thread: tuple) -> list[dict]:
    return [event for event in _annotations(events, PHASES.__contains__) if _thread(event) == thread]


def _segments(step: dict, phases: Sequence[dict]) -> list[Segment]:
    """A step cut where phases begin and end, each part under the innermost phase."""
    inside = [phase for phase in phases if step["ts"] <= phase["ts"] < _end(step) and phase["dur"]]
    edges = [(phase["ts"], 1, -phase["dur"], phase["name"]) for phase in inside]
    edges += [(_end(phase), 0, 0.0, "") for phase in inside]
    found, open_phases, position = [], [OTHER], step["ts"]
    for moment, opens, _, name in [*sorted(edges), (_end(step), 0, 0.0, "")]:
        moment = min(moment, _end(step))
        if moment > position:
            found.append(Segment(position, moment, open_phases[-1]))
            position = moment
        if opens:
            open_phases.append(name)
        elif len(open_phases) > 1:
            open_phases.pop()
    return found


def _with_reductions(segments: Sequence[Segment], events: Sequence[dict], thread: tuple) -> list[Segment]:
    """Take the collectives that nothing hides out of the phases whose reductions are told apart."""
    host = [event for event in events if event.get("cat") in ("user_annotation", "cpu_op")]
    collectives = _union(e for e in host if e["name"].startswith(("gloo:", "nccl:", "c10d::")))
    computing = _union(e for e in host if e["name"].startswith("aten::") and _thread(e) == thread)
    waits = _without(collectives, computing)
    found = []
    for part in segments:
        if part.phase not in REDUCED:
            found.append(part)
            continue
        position = part.start
        for start, end in waits[max(0, bisect_right(waits, (part.start,)) - 1) :]:
            start, end = max(start, part.start), min(end, part.end)
            if start >= part.end:
                break
            if end > start:
                found += [Segment(position, start, part.phase), Segment(start, end, REDUCE)]
                position = end
        found.append(Segment(position, part.end, part.phase))
    return found


def _union(events: Iterable[dict]) -> Spans:
    """When any of them was under way."""
    found: Spans = []
    for start, end in sorted((event["ts"], _end(event)) for event in events):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _without(spans: Spans, others: Spans) -> Spans:
    """The parts of some spans that do not lie in others."""
    found: Spans = []
    first = 0
    for start, end in spans:
        while first < len(others) and others[first][1] <= start:
            first += 1
        for other_start, other_end in others[first:]:
            if other_start >= end:
                break
            if other_start > start:
                found.append((start, other_start))
            start = max(start, other_end)
        if start < end:
            found.append((start, end))
    return found


class _Kernel(NamedTuple):
    start: float
    end: float
    phase: str
    name: str
    operator: object  # the trace's number of the operator that launched it
    computes: bool  # it is none that copies or fills memory


def _kernels(events: Sequence[dict], segments: Sequence[Segment]) -> list[_Kernel]:
    """The kernels, copies and fills launched in the steps, in the order in which they began."""
    launches = {}
    for event in events:
        if event.get("cat") in ("cuda_runtime", "cuda_driver"):
            launches[event["args"].get("correlation")] = event["ts"]
    starts = [part.start for part in segments]
    found = []
    for event in events:
        launched = launches.get(event["args"].get("correlation")) if event.get("cat") in DEVICE_WORK else None
        if launched is None or not segments[0].start <= launched < segments[-1].end:
            continue
        phase = segments[bisect_right(starts, launched) - 1].phase
        operator, computes = event["args"].get("External id"), event["cat"] == "kernel"
        found.append(_Kernel(event["ts"], _end(event), phase, event["name"], operator, computes))
    return sorted(found)


def _device(kernels: Sequence[_Kernel]) -> dict[str, float]:
    """Microseconds by phase, from the first one's begin to the last one's end."""
    found: dict[str, float] = defaultdict(float)
    busy: Spans = []
    collectives = [kernel for kernel in kernels if _communicates(kernel)]
    others = [kernel for kernel in kernels if not _communicates(kernel)]
    for computes in (True, False):
        position, before = 0.0, list(busy)
        for kernel in (kernel for kernel in others if kernel.computes == computes):
            start = max(kernel.start, position)  # what another stream does at the same time counts once
            parts = _without([(start, kernel.end)], before) if kernel.end > start else []
            found[kernel.phase] += sum(end - start for start, end in parts)
            busy += parts
            position = max(position, kernel.end)
        busy.sort()
    alone = _without(_union({"ts": k.start, "dur": k.end - k.start} for k in collectives), busy)
    found[REDUCE] = sum(end - start for start, end in alone)
    found[IDLE] = max(kernel.end for kernel in kernels) - kernels[0].start - sum(found.values())
    return found


def _communicates(kernel: _Kernel) -> bool:
    return "nccl" in kernel.name.lower()


def _operators(
    events: Sequence[dict], segments: Sequence[Segment], kernels: Sequence[_Kernel], scale: float
) -> list[dict]:
    """Those that take the most time by themselves: of their kernels where there are any, else of the host."""
    if kernels:
        names = {e["args"].get("External id"): e["name"] for e in events if e.get("cat") == "cpu_op"}
        taken = [(names.get(kernel.operator, kernel.name), kernel.end - kernel.start) for kernel in kernels]
    else:
        taken = _self_times(e for e in events if e.get("cat") == "cpu_op" and _lies_in(e, segments))
    times, calls = defaultdict(float), defaultdict(int)
    for name, microseconds in taken:
        times[name] += microseconds * scale
        calls[name] += 1
    greatest = sorted(times, key=times.__getitem__, reverse=True)[:MOST_OPERATORS]
    return [{"name": name, "calls": calls[name] * scale * 1e3, "ms": times[name]} for name in greatest]


def _lies_in(event: dict, segments: Sequence[Segment]) -> bool:
    return segments[0].start <= event["ts"] < segments[-1].end


def _self_times(events: Iterable[dict]) -> list[tuple[str, float]]:
    """Each operator's name and its time without that of operators inside it, thread by thread."""
    by_thread = defaultdict(list)
    for event in events:
        by_thread[_thread(event)].append(event)
    found: list[list] = []
    for own in by_thread.values():
        around: list[tuple[float, list]] = []  # ends, and entries of `found`, from the outermost on
        for event in sorted(own, key=lambda e: (e["ts"], -e["dur"])):
            while around and around[-1][0] <= event["ts"]:
                around.pop()
            if around:
                around[-1][1][1] -= event["dur"]
            entry = [event["name"], event["dur"]]
            found.append(entry)
            around.append((_end(event), entry))
    return [(name, microseconds) for name, microseconds in found]
