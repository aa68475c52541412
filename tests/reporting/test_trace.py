"""A profiler's trace becomes a step's phases: on made traces whose answer is plain, for host and device."""

import gzip
import json

import pytest

from varscale.reporting.step_profile import phase_rows, read_step_profile, write_step_profile
from varscale.reporting.trace import analyse

MAIN, OTHER_THREAD, STREAM, NCCL_STREAM = 1, 2, 7, 20


def event(name, start, end, category="user_annotation", thread=MAIN, **args):
    """Times in milliseconds."""
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": 1e3 * start,
            "dur": 1e3 * (end - start), "args": args}  # fmt: skip


def step(number, start):
    """20 ms: waiting 2; augmenting 3, of them copying 1; loss 5, of them forward 4; backward 6; optimizer 2; rest 2."""
    return [
        event(f"ProfilerStep#{number}", start, start + 20),
        event("data wait", start, start + 2),
        event("logging", start + 5, start + 5),  # too short to be seen
        event("augment", start + 2, start + 5),
        event("copy", start + 3, start + 4),
        event("loss", start + 5, start + 10),
        event("forward", start + 5, start + 9),
        event("backward", start + 10, start + 16),
        event("optimizer", start + 17, start + 19),
    ]


def kernel(name, start, end, launched, number, stream=STREAM, thread=MAIN, category="kernel"):
    """A kernel, or other work of the device, its launch and the operator that launched it."""
    return [
        event(f"aten::{name}", launched, launched + 0.01, "cpu_op", thread, **{"External id": number}),
        event("cudaLaunchKernel", launched, launched + 0.005, "cuda_runtime", thread, correlation=number),
        event(name, start, end, category, stream, correlation=number, **{"External id": number}),
    ]


def test_every_instant_belongs_to_the_innermost_phase():
    found = analyse([*step(2, 0.0), *step(3, 20.0)])
    assert found["host"] == pytest.approx(
        {"data wait": 2, "copy": 1, "augment": 2, "forward": 4, "loss": 1, "backward": 6, "optimizer": 2, "other": 2}
    )
    assert list(found["host"]) == [
        "data wait", "copy", "augment", "forward", "loss", "backward", "optimizer", "other"
    ]  # fmt: skip
    assert (found["steps"], found["step_ms"]) == (2, pytest.approx(20))
    assert "device" not in found


def test_a_step_without_an_update_and_phases_of_other_threads_do_not_count():
    stump = event("ProfilerStep#4", 20.0, 21.0)
    elsewhere = event("logging", 1.0, 19.0, thread=OTHER_THREAD)
    found = analyse([*step(3, 0.0), stump, elsewhere])
    assert found["step_ms"] == pytest.approx(20)
    assert "logging" not in found["host"]
    with pytest.raises(ValueError, match="no whole step"):
        analyse([stump])


def test_collectives_that_nothing_hides_are_taken_from_backward_and_optimizer():
    collectives = [
        event("gloo:all_reduce", 6.0, 7.0, thread=OTHER_THREAD),  # in the forward pass
        event("gloo:all_reduce", 12.0, 15.0, thread=OTHER_THREAD),
        event("c10d::allreduce_", 12.0, 12.5, "cpu_op"),
        event("aten::mm", 13.0, 14.0, "cpu_op"),
        event("gloo:all_gather", 15.5, 17.5, thread=OTHER_THREAD),  # over the end of one into the other
    ]
    host = analyse([*step(2, 0.0), *collectives])["host"]
    assert host["reduce"] == pytest.approx(2 + 0.5 + 0.5)
    assert host["backward"] == pytest.approx(6 - 2.5)
    assert host["optimizer"] == pytest.approx(2 - 0.5)
    assert (host["forward"], host["other"]) == (pytest.approx(4), pytest.approx(2))
    assert sum(host.values()) == pytest.approx(20)


def test_kernels_stand_with_the_phase_that_launched_them():
    events = [
        *step(2, 0.0),
        *kernel("conv", 8.0, 14.0, launched=6.0, number=1),
        *kernel("conv_backward", 14.0, 20.0, launched=11.0, number=2, thread=OTHER_THREAD),
        *kernel("ncclDevKernel_AllReduce", 18.0, 22.0, launched=12.0, number=3, stream=NCCL_STREAM),
        *kernel("other_stream", 19.0, 21.0, launched=12.5, number=4, stream=9),
        *kernel("sgd", 25.0, 26.0, launched=17.5, number=5),
        event("nccl:all_reduce", 12.0, 15.0, "gpu_user_annotation", NCCL_STREAM),
        *kernel("before", 1.0, 2.0, launched=-1.0, number=6),
    ]
    found = analyse(events)
    assert found["device"] == pytest.approx({"forward": 6, "backward": 7, "reduce": 1, "optimizer": 1, "idle": 3})
    assert found["device_step_ms"] == pytest.approx(26 - 8)
    assert "reduce" not in found["host"], "the host waits for none"
    assert [one["name"] for one in found["operators"][:2]] == ["aten::conv", "aten::conv_backward"]
    assert found["operators"][0] == {"name": "aten::conv", "calls": 1.0, "ms": pytest.approx(6)}
    heads, *rows = phase_rows(found)
    assert heads == ("phase", "host ms", "share", "device ms", "share of device")
    assert ("idle", "", "", "3.00", "16.7%") in rows
    assert ("copy", "1.00", "5.0%", "", "") in rows


def test_copies_and_fills_are_work_of_the_device_where_nothing_computes():
    events = [
        *step(2, 0.0),
        *kernel("Memcpy HtoD (Pinned -> Device)", 4.0, 6.0, launched=3.5, number=1, stream=9, category="gpu_memcpy"),
        *kernel("Memset (Device)", 6.0, 6.5, launched=6.0, number=2, category="gpu_memset"),
        *kernel("Memcpy HtoD (Pinned -> Device)", 7.0, 10.0, launched=3.6, number=3, stream=9, category="gpu_memcpy"),
        *kernel("conv", 7.5, 9.0, launched=6.5, number=4),
        *kernel("ncclDevKernel_AllReduce", 9.5, 11.0, launched=12.0, number=5, stream=NCCL_STREAM),
    ]
    found = analyse(events)
    assert found["device"] == pytest.approx({"copy": 2 + 0.5 + 1, "forward": 0.5 + 1.5, "reduce": 1, "idle": 0.5})
    assert found["device_step_ms"] == pytest.approx(7)


def test_operators_have_the_time_that_those_inside_them_leave():
    operators = [
        event("aten::linear", 6.0, 8.0, "cpu_op"),
        event("aten::mm", 6.5, 7.5, "cpu_op"),
        event("aten::mm", 11.0, 14.0, "cpu_op", OTHER_THREAD),
        *(event(f"small {i}", 15.0, 15.001, "cpu_op") for i in range(20)),
    ]
    found = analyse([*step(2, 0.0), *operators])["operators"]
    assert [(one["name"], one["calls"]) for one in found[:2]] == [("aten::mm", 2), ("aten::linear", 1)]
    assert [one["ms"] for one in found[:2]] == pytest.approx([4, 1])
    assert len(found) == 10


def test_what_is_written_can_be_read_again(tmp_path):
    folder = tmp_path / "profile"
    folder.mkdir()
    assert read_step_profile(tmp_path) is None
    trace = folder / "trace-rank-0.json.gz"
    with gzip.open(trace, "wt") as file:
        json.dump({"traceEvents": [*step(2, 0.0), {"ph": "M", "name": "process_name"}]}, file)
    told = write_step_profile(trace)
    assert "| forward   |    4.00 |  20.0% |" in told
    assert str(trace) in told
    assert "| step      |   20.00 | 100.0% |" in (folder / "profile.md").read_text()
    assert read_step_profile(tmp_path)["host"]["backward"] == pytest.approx(6)
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    for damaged in ("{", "[]", '{"steps": 1, "step_ms": 1, "operators": [], "host": {"of another version": 1}}'):
        (folder / "profile.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"profile\.json: is damaged"):
            read_step_profile(tmp_path)
