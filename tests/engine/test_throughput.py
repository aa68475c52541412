"""Throughput on a clock that is told what time it is; operations, peaks and memory against what is known."""

import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch

from varscale.config import load_config, resolve_batch
from varscale.engine.distributed import Ranks
from varscale.engine.flops import step_flops
from varscale.engine.launch import Job
from varscale.engine.learners import build_learner
from varscale.engine.metrics import MEASURED
from varscale.engine.peaks import PEAKS, Peak, peak_of
from varscale.engine.throughput import GIB, DeviceClock, Throughput, memory_peaks

CPU = torch.device("cpu")


class ToldClock:
    """A clock whose time the test sets; what is later than `reached` has not passed yet."""

    def __init__(self):
        self.now, self.reached = 0.0, float("inf")

    def stamp(self):
        return self.now

    def has_passed(self, stamp):
        return stamp <= self.reached

    def seconds(self, start, end):
        return end - start


def throughput(clock, peak=None, flops=lambda: 6 * 10**12):
    return Throughput(64, 128, flops, peak, CPU, clock)


def take(speed, clock, seconds, waited=0.0):
    with speed.waiting():
        clock.now += waited
    clock.now += seconds - waited
    speed.end()


def test_what_steps_come_to():
    clock = ToldClock()
    speed = throughput(clock, Peak(10.0, "bfloat16"))
    for seconds, waited in ((1.0, 0.25), (2.0, 0.0), (3.0, 0.5), (4.0, 0.25)):
        take(speed, clock, seconds, waited)
    found = speed.read()
    assert found.pop("process_memory_peak_gib") > 0
    assert found == pytest.approx(
        {
            "images_per_second": 4 * 64 / 10,
            "views_per_second": 4 * 128 / 10,
            "step_ms_p50": 2500.0,
            "step_ms_p90": 3700.0,
            "step_ms_max": 4000.0,
            "data_wait_share": 0.1,
            "tflops": 4 * 6 / 10,
            "mfu": 0.24,
        }
    )
    take(speed, clock, 2.0)
    assert speed.read()["images_per_second"] == pytest.approx(32), "a reading tells of the steps since the one before"


def test_what_is_done_between_steps_belongs_to_none():
    clock = ToldClock()
    speed = throughput(clock)
    clock.now = 100.0  # set-up
    speed.begin()
    take(speed, clock, 1.0, waited=0.5)
    clock.now += 50.0  # a checkpoint
    speed.begin()
    take(speed, clock, 1.0)
    found = speed.read()
    assert (found["step_ms_max"], found["images_per_second"], found["data_wait_share"]) == (1000.0, 64.0, 0.25)
    assert "mfu" not in found


def test_steps_that_the_device_has_not_ended_yet_are_read_later():
    clock = ToldClock()
    speed = throughput(clock)
    clock.reached = 0.5
    take(speed, clock, 1.0)
    assert speed.read() == {}
    take(speed, clock, 3.0)
    clock.reached = 1.0
    assert speed.read()["step_ms_max"] == 1000.0
    clock.reached = 4.0
    assert speed.read()["step_ms_max"] == 3000.0


def test_operations_are_counted_once():
    counted, clock = [], ToldClock()

    def count():
        counted.append(clock.now)
        clock.now += 100.0
        return 10**12

    speed = throughput(clock, flops=count)
    assert not counted
    for _ in range(2):
        take(speed, clock, 2.0)
        found = speed.read()
        assert found["tflops"] == pytest.approx(0.5)
    assert counted == [2.0]


@pytest.mark.parametrize("objective", ["varcon", "vssl", "supcon", "simclr", "byol", "mocov3", "cross_entropy"])
def test_a_run_counts_the_operations_of_its_learner_and_draws_no_random_number(objective):
    accumulating = ["batch.gradient_accumulation_steps=2", "encoder.stem=cifar"]
    config = load_config(f"digits-{objective}", accumulating)
    sizes = resolve_batch(config.batch, 2)
    data = SimpleNamespace(info=SimpleNamespace(num_classes=10))
    speed = Throughput.of(Job(config, sizes, {}, data), Ranks(0, 0, 2, 2, CPU))
    state = torch.get_rng_state()
    speed.end()
    found = speed.read()
    assert torch.equal(torch.get_rng_state(), state)
    assert speed.flops == sum(step_flops(config, sizes, build_learner(config, 10, 1, CPU)).values())
    assert found["views_per_second"] == pytest.approx(found["images_per_second"] * config.data.views)
    assert speed.images == config.batch.global_batch_size
    assert found.keys() == set(MEASURED) - {"mfu", "device_memory_peak_gib"}


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA H100 NVL", "NVIDIA H100 NVL"),
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100"),
        ("NVIDIA L4", "NVIDIA L4"),
        ("NVIDIA L40S", "NVIDIA L40S"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_peaks_are_those_of_the_device(device, name):
    assert peak_of(device, "bfloat16") == Peak(PEAKS[name][0], "bfloat16")
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert peak_of(device, "float32") == Peak(PEAKS[name][1], "TF32")
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert peak_of(device, "float32") == Peak(PEAKS[name][2], "float32")


@pytest.mark.parametrize(
    "device",
    ["cpu", "NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA"],
)
def test_other_devices_have_no_peak(device):
    assert peak_of(device, "bfloat16") is None


def test_tf32_is_half_of_bfloat16():
    """As on every tensor core that has both; a number with sparsity, or of another format, would stand out."""
    for name, (bfloat16, tf32, float32) in PEAKS.items():
        assert bfloat16 == pytest.approx(2 * tf32, rel=0.02), name
        assert float32 <= tf32, name


def test_a_process_remembers_the_most_memory_it_had():
    code = """
        import torch
        from varscale.engine.throughput import memory_peaks

        def peak():
            (name, value), = memory_peaks(torch.device("cpu")).items()
            assert name == "process_memory_peak_gib"
            return value

        b"x" * 2**29  # or what imports had taken and freed would count
        before, block = peak(), b"x" * 2**30
        with_block = peak()
        del block
        print(before, with_block, peak())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    before, with_block, after = map(float, done.stdout.split())
    assert 0.45 < with_block - before < 0.55
    assert after == pytest.approx(with_block, abs=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_tells_its_own_time_and_the_peak_since_the_last_reading():
    device, clock = torch.device("cuda"), DeviceClock()
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    before = time.perf_counter()
    start = clock.stamp()
    for _ in range(20):
        matrix @ matrix
    end = clock.stamp()
    torch.cuda.synchronize()
    assert clock.has_passed(end)
    assert 0 < clock.seconds(start, end) <= time.perf_counter() - before

    large = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert memory_peaks(device)["device_memory_peak_gib"] >= large.nbytes / GIB
    del large
    memory_peaks(device)
    assert memory_peaks(device)["device_memory_peak_gib"] < 2**28 / GIB
