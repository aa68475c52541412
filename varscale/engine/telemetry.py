"""What a person sees of a run: the progress bar, metrics.jsonl and the trackers; only rank 0 speaks."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Self

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from tqdm import tqdm

from varscale.config import Config
from varscale.engine.distributed import Ranks
from varscale.engine.launch import Job
from varscale.engine.learners import Learner, Shown, Terms
from varscale.engine.manifest import write_manifest
from varscale.engine.meter import Meter
from varscale.engine.metrics import MetricsFile
from varscale.engine.phases import in_phase, phase
from varscale.engine.state import TrainState
from varscale.engine.taken import TakenStep
from varscale.engine.throughput import Throughput
from varscale.models.precision import is_fast_in_bfloat16

# On the progress bar, and what for.
SHOWN = {name: name for name in ("loss", "kl", "nll", "cosine", "top1", "lr")}
SHOWN |= {"images_per_second": "images/s", "data_wait_share": "data wait", "mfu": "MFU"}
SHOWN |= {"views_per_second": "views/s", "step_ms_p50": "ms", "step_ms_p90": "p90 ms"}
SHOWN |= {"process_memory_peak_gib": "GiB", "device_memory_peak_gib": "GiB"}  # the device's, where there is one


class Telemetry:
    """Makes the run's directory, then writes and shows what happens in it; on other ranks than the first, silent.

    A context manager. `state` is where the run stands at any time; the length of metrics.jsonl is noted in it.
    `every_steps` (logging) is also how often values are read from the device.
    """

    def __init__(self, job: Job, total_steps: int, state: TrainState, meter: Meter, ranks: Ranks) -> None:
        self.config = config = job.config
        self.first, self.state, self.meter = ranks.is_first, state, meter
        self.total_steps, self.steps_per_epoch = total_steps, total_steps // config.schedule.epochs
        self.throughput = Throughput.of(job, ranks)
        self.trackers: list[GeneralTracker] = []
        self.warned = -1  # the last epoch in which a warning was given
        self.coming: Callable[[], None] | None = None
        if not self.first:
            return
        run = config.output_dir
        write_manifest(
            config,
            job.deepspeed,
            job.data.info.digest,
            world_size=ranks.world_size,
            device=ranks.device_name,
            peak=self.throughput.peak,
        )
        self.metrics = MetricsFile(run / "metrics.jsonl", state.metrics_bytes, self.warn)
        state.metrics_bytes = self.metrics.position  # less where the checkpoint is of another run
        self.trackers = [_start_tracker(name, run, config, state.step) for name in config.logging.trackers]
        # In a log file every redrawn bar is one more line.
        interval = 0.1 if sys.stderr.isatty() else 30
        self.bar = tqdm(
            total=total_steps, initial=state.step, unit="step", dynamic_ncols=True, smoothing=0.1, mininterval=interval
        )
        if config.compute.precision == "bfloat16" and not is_fast_in_bfloat16(ranks.device):
            self.say("note: without AMX, compute.precision=float32 may be the faster one on this CPU")

    def __enter__(self) -> Self:
        self.throughput.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.catch_up()
        if self.first:
            self.bar.close()
            self.metrics.close()
            for tracker in self.trackers:
                tracker.finish()

    @in_phase("logging")
    def step(self, learner: Learner, step: TakenStep) -> None:
        """Show that a step was taken; every so many, record what they came to over micro-batches, steps and ranks.

        That is on its way from the device then, and recorded when the next step is shown, or by `catch_up`.
        """
        self.catch_up()
        if not step.is_bad:
            self.meter.add(step.terms)
        if self.first:
            epoch = (step.number - 1) // self.steps_per_epoch + 1
            self.bar.set_description(f"epoch {epoch}/{self.config.schedule.epochs}", refresh=False)
            self.bar.update()
        is_due = step.number % self.config.logging.every_steps == 0 or step.number == self.total_steps
        if is_due and self.meter.steps:
            others = {"epoch": step.number / self.steps_per_epoch, "lr": step.lr, "gradient_norm": step.gradient_norm}
            others |= self.throughput.read(leave=self.state.step - step.number)
            self.coming = partial(self._show, learner, step.number, self.meter.begin_reading(), others)

    def catch_up(self) -> None:
        """Record what was on its way from the device."""
        if self.coming is not None:
            show, self.coming = self.coming, None
            show()

    def _show(self, learner: Learner, step: int, means: Callable[[], Terms], others: Shown) -> None:
        values = learner.derive(means()) | others
        self.record("train", values, step)
        self._warn_once_an_epoch(learner.warning(values), step)

    def record(self, kind: str, values: Shown, step: int | None = None) -> None:
        """Write one line of metrics.jsonl, show it and pass it to the trackers, those values that are numbers.

        step: the one that it belongs to, if it is not the last.
        """
        if not self.first:
            return
        step = self.state.step if step is None else step
        self.metrics.write({"kind": kind, "step": step, "time": round(time.time(), 3), **values})
        self.state.metrics_bytes = self.metrics.position
        if kind == "train":
            shown = {name: f"{values[key]:.4g}" for key, name in SHOWN.items() if key in values}
            self.bar.set_postfix(shown, refresh=False)
        else:
            self.say("  ".join([kind, f"step {step}", *(f"{name} {value:g}" for name, value in values.items())]))
        numbers = {f"{kind}/{name}": value for name, value in values.items() if not isinstance(value, list)}
        for tracker in list(self.trackers):
            try:
                tracker.log(numbers, step=step)
            except OSError as error:  # the disk is full
                self.trackers.remove(tracker)
                self.warn(f"{tracker.name} cannot be written ({error}) and is left out from now on")

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """What is done inside stands in the phase `name` of a profile, and counts for no step's time."""
        with phase(name):
            yield
        self.throughput.begin()

    def sync(self) -> None:
        """Wait until the metrics of all steps shown are on the disk: a checkpoint refers to their length."""
        self.catch_up()
        if self.first:
            self.metrics.sync()

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.first:
            self.bar.write(message)

    def warn(self, message: str) -> None:
        """Print a line that must not be overlooked."""
        self.say(f"WARNING: {message}")

    def _warn_once_an_epoch(self, warning: str | None, step: int) -> None:
        epoch = (step - 1) // self.steps_per_epoch
        if warning and epoch != self.warned:
            self.warned = epoch
            self.warn(f"step {step}: {warning}")


def _start_tracker(name: str, run: Path, config: Config, step: int) -> GeneralTracker:
    """step: what the tracker has of later ones belongs to steps that will be taken again."""
    if name == "wandb":
        tracker = WandBTracker(config.name, config=config.model_dump(mode="json"), dir=str(run))
    else:
        tracker = TensorBoardTracker("tensorboard", str(run), purge_step=step + 1)
    tracker.start()
    return tracker
