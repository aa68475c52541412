"""What the benchmarks measure alike, and how they end."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from varscale.engine.launch import report_user_error
from varscale.errors import UserError


def run(main: Callable[[], int | None]) -> int | None:
    """A program's exit code: that of `main`; for a mistake in the input 2, told in one line."""
    try:
        return main()
    except UserError as error:
        return report_user_error(error)


def resident_growth(work: Callable[[], object]) -> int:
    """Bytes by which this process's resident memory rises at most while `work` runs (Linux).

    Resets the kernel's high-water mark first: that of `getrusage` outlives even the start of another program.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def peak_of_tensors(prepare: Callable[[], object], work: Callable[[object], object], device: torch.device) -> int:
    """Bytes of all tensors, those that `prepare` left included, at most while `work` runs on what it returned.

    On a GPU the allocator's own count, on a CPU torch's allocations as its profiler sees them.
    """
    if device.type == "cuda":
        state = prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work(state)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        state = prepare()
        with record_function("measured work"):
            work(state)
    events = recorded.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == "measured work")
    allocations = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for time, size in allocations:
        now += size
        peak = max(peak, now) if time >= begin else now
    return peak
