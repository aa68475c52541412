"""`--profile`: a few steps of a run under torch's profiler, a trace for each rank, and what is then made of it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

from torch.profiler import ProfilerActivity, profile, schedule

from varscale.engine.distributed import Ranks
from varscale.engine.launch import Job
from varscale.engine.rundir import profile_folder
from varscale.engine.telemetry import Telemetry
from varscale.files import make_folder

UNSEEN, ACTIVE = 2, 6  # steps: to warm up, the last of them with the profiler started; and to record


class Profile:
    """Records some of the first steps of a start; does nothing where it is not wanted.

    A context manager; a run that ends early leaves what was recorded until then. Traces of earlier starts are replaced.

    finish: makes of rank 0's trace what people read, and returns what they are told.
    """

    def __init__(self, job: Job, ranks: Ranks, telemetry: Telemetry, finish: Callable[[Path], str]) -> None:
        self.folder, self.ranks = profile_folder(job.config.output_dir), ranks
        self.telemetry, self.finish = telemetry, finish
        self.profiler = self._open() if job.profile else None

    def _open(self) -> profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it would call it an error that a machine has no GPU
        activities = [ProfilerActivity.CPU]
        if self.ranks.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        steps = schedule(wait=UNSEEN - 1, warmup=1, active=ACTIVE, repeat=1)
        return profile(activities=activities, schedule=steps, on_trace_ready=self._keep)

    def __enter__(self) -> Self:
        if self.profiler:
            self.profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def step(self) -> None:
        """A step is over, with all that was done behind it."""
        if self.profiler:
            self.profiler.step()
            if self.profiler.step_num == UNSEEN + ACTIVE:
                self._stop()

    def _stop(self) -> None:
        profiler, self.profiler = self.profiler, None
        if profiler:
            profiler.stop()
            if not _has_recorded(profiler):
                self.telemetry.warn(f"--profile: the run ended within {UNSEEN} steps; later ones would be recorded")

    def _keep(self, profiler: profile) -> None:
        if not _has_recorded(profiler):
            return
        with self.telemetry.aside("logging"):
            trace = self.folder / f"trace-rank-{self.ranks.rank}.json.gz"
            try:
                make_folder(self.folder)
                profiler.export_chrome_trace(str(trace))
                if self.ranks.is_first:
                    self.telemetry.say(self.finish(trace))
            except OSError as error:
                self.telemetry.warn(f"--profile: {self.folder} cannot be written ({error}); training goes on")


def _has_recorded(profiler: profile) -> bool:
    """Whether there is a whole step in the trace."""
    return profiler.step_num > UNSEEN
