"""How fast a run trains: images a second, times of steps, waits for data, operations a second, peaks of memory.

A step lasts from the end of the step before to its own; checkpoints, evaluation and writing a profile belong to none.
The first step of a start is counted, with all that is set up in it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch

from varscale.engine.distributed import Ranks
from varscale.engine.flops import step_flops
from varscale.engine.launch import Job
from varscale.engine.learners import build_learner
from varscale.engine.peaks import Peak, peak_of

GIB = 2**30
Stamp = TypeVar("Stamp")


class Clock(Protocol[Stamp]):
    """What a step is timed with."""

    def stamp(self) -> Stamp:
        """Now."""

    def has_passed(self, stamp: Stamp) -> bool:
        """Whether the time of a stamp can be told."""

    def seconds(self, start: Stamp, end: Stamp) -> float:
        """From one to the other; both must have passed."""


class HostClock:
    """The host's time."""

    def stamp(self) -> float:
        return time.perf_counter()

    def has_passed(self, stamp: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


class DeviceClock:
    """When a CUDA device came to a place in its queue: the host may be steps ahead, and must not wait to know.

    Between two places the device waits for the host if it has nothing else to do: a wait for data counts as far as it
    holds the device up.
    """

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def has_passed(self, stamp: torch.cuda.Event) -> bool:
        return stamp.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3


@dataclass
class _Step:
    start: object
    end: object = None
    waits: list[tuple] = field(default_factory=list)


class Throughput:
    """The speed of the steps between two readings.

    Images and views are those of all ranks, which take their steps together; times, waits, operations and memory those
    of this rank.

    images, views: of a step over all ranks. count_flops: the operations of this rank in a step; called once, at the
    first reading. peak: what the device could do; without it there is no MFU.
    """

    def __init__(
        self,
        images: int,
        views: int,
        count_flops: Callable[[], int],
        peak: Peak | None,
        device: torch.device,
        clock: Clock,
    ) -> None:
        self.images, self.views, self.count_flops, self.peak = images, views, count_flops, peak
        self.device, self.clock = device, clock
        self.flops: int | None = None
        self.ended: list[_Step] = []
        self.begin()

    @classmethod
    def of(cls, job: Job, ranks: Ranks) -> "Throughput":
        """That of a run's rank."""
        config, images = job.config, job.sizes.global_batch_size

        def count_flops() -> int:
            # The learner that is trained may be partitioned; this one takes no memory.
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                learner = build_learner(config, job.data.info.num_classes, 1, torch.device("meta"))
            flops = step_flops(config, job.sizes, learner)
            flops.pop("recomputation", None)  # work that gets a step no further
            return sum(flops.values())

        views = images * sum(config.data.views_by_size.values())
        clock = DeviceClock() if ranks.device.type == "cuda" else HostClock()
        peak = peak_of(ranks.device_name, config.compute.precision)
        return cls(images, views, count_flops, peak, ranks.device, clock)

    def begin(self) -> None:
        """The next step begins now: what was done since the last one ended belongs to none."""
        self.step = _Step(self.clock.stamp())

    def end(self) -> None:
        """A step ends, and the next begins."""
        self.step.end = self.clock.stamp()
        self.ended.append(self.step)
        self.step = _Step(self.step.end)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the step waits for data."""
        start = self.clock.stamp()
        yield
        self.step.waits.append((start, self.clock.stamp()))

    def read(self, leave: int = 0) -> dict[str, float]:
        """What the steps since the last reading came to, all but the last `leave`; the keys are `metrics.MEASURED`.

        Steps whose end the device has not come to yet wait for the next reading; without any there are no values.
        """
        candidates = self.ended[: len(self.ended) - leave]
        ended = list(takewhile(lambda step: self.clock.has_passed(step.end), candidates))
        self.ended = self.ended[len(ended) :]
        if not ended:
            return {}
        if self.flops is None:
            self.flops = self.count_flops()
            self.begin()  # counting is no part of the next step
        seconds = np.array([self.clock.seconds(step.start, step.end) for step in ended])
        waited = sum(self.clock.seconds(*wait) for step in ended for wait in step.waits)
        rate = len(ended) / seconds.sum()
        p50, p90 = np.percentile(seconds, (50, 90))
        values = {
            "images_per_second": self.images * rate,
            "views_per_second": self.views * rate,
            "step_ms_p50": 1e3 * p50,
            "step_ms_p90": 1e3 * p90,
            "step_ms_max": 1e3 * seconds.max(),
            "data_wait_share": waited / seconds.sum(),
            "tflops": self.flops * rate / 1e12,
        }
        if self.peak:
            values["mfu"] = values["tflops"] / self.peak.tflops
        return {name: float(value) for name, value in values.items()} | memory_peaks(self.device)


def memory_peaks(device: torch.device) -> dict[str, float]:
    """In GiB: of this process's resident memory since it began, and on CUDA of torch's tensors since the last call."""
    lines = Path("/proc/self/status").read_text().splitlines()
    resident = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    peaks = {"process_memory_peak_gib": resident / GIB}
    if device.type == "cuda":
        peaks["device_memory_peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        torch.cuda.reset_peak_memory_stats(device)
    return peaks
