"""What a person sees of a run: the progress bar, metrics.jsonl and the trackers; only rank 0 speaks."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self, TextIO

import torch
import torch.distributed as dist
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from torch import Tensor
from tqdm import tqdm

from varscale.config import Config
from varscale.engine.distributed import Ranks
from varscale.engine.learners import Learner
from varscale.engine.manifest import write_manifest
from varscale.engine.rundir import read_metrics
from varscale.engine.state import TrainState

SHOWN = ("loss", "kl", "nll", "cosine", "lr", "images_per_second")  # on the progress bar


class Meter:
    """What the terms of steps come to over micro-batches, steps and ranks; kept on their device until it is read.

    Scalars are averaged over all steps since the last reading; those whose name ends in _min or _max are the least or
    greatest, those in _count the sum. Vectors and matrices are averaged over the last step alone: what is derived from
    them, like a variance from means, must belong to one state of the network.
    """

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self.steps = 0
        self.sums: dict[str, Tensor] = {}  # over steps, of averages over micro-batches
        self.counts: dict[str, Tensor] = {}
        self.latest: dict[str, Tensor] = {}
        self.extremes: dict[str, Tensor] = {}  # of the negative value for _min

    def add(self, step: Sequence[dict[str, Tensor]]) -> None:
        """Take in a step: the terms of each of its micro-batches, equally many on every rank."""
        self.steps += 1
        for name in step[0]:
            values = torch.stack([terms[name].detach().double() for terms in step])
            if name.endswith(("_min", "_max")):
                extreme = (values * _sign(name)).max()
                self.extremes[name] = extreme.maximum(self.extremes.get(name, extreme))
            elif name.endswith("_count"):
                self.counts[name] = self.counts.get(name, 0.0) + values.sum()
            elif values.ndim > 1:
                self.latest[name] = values.mean(dim=0)
            else:
                self.sums[name] = self.sums.get(name, 0.0) + values.mean()

    def read(self) -> dict[str, Tensor]:
        """What was added on every rank since the last call, in float64 on the CPU. A collective."""
        means = {name: total / self.steps for name, total in self.sums.items()} | self.latest
        shares = {name: mean / dist.get_world_size() for name, mean in means.items()}
        found = _all_reduce(shares | self.counts, dist.ReduceOp.SUM)
        found |= {name: _sign(name) * value for name, value in _all_reduce(self.extremes, dist.ReduceOp.MAX).items()}
        self._start_anew()
        return found


class Telemetry:
    """Makes the run's directory, then writes and shows what happens in it; on other ranks than the first, silent.

    A context manager. `every_steps` (logging) is also how often values are read from the device.
    """

    def __init__(
        self, config: Config, deepspeed: dict, data_digest: str, total_steps: int, state: TrainState, ranks: Ranks
    ) -> None:
        self.config, self.first, self.meter = config, ranks.is_first, Meter()
        self.total_steps, self.steps_per_epoch = total_steps, total_steps // config.schedule.epochs
        self.window = (time.perf_counter(), state.samples_seen)
        self.trackers: list[GeneralTracker] = []
        self.warned = -1  # the last epoch in which a warning was given
        if not self.first:
            return
        run = config.output_dir
        write_manifest(config, deepspeed, data_digest, world_size=ranks.world_size, device=ranks.device_name)
        self.metrics = _open_metrics(run / "metrics.jsonl", state.step)
        self.trackers = [_start_tracker(name, run, config) for name in config.logging.trackers]
        # In a log file every redrawn bar is one more line.
        interval = 0.1 if sys.stderr.isatty() else 30
        self.bar = tqdm(
            total=total_steps, initial=state.step, unit="step", dynamic_ncols=True, smoothing=0.1, mininterval=interval
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.first:
            self.bar.close()
            self.metrics.close()
            for tracker in self.trackers:
                tracker.finish()

    def step(
        self,
        learner: Learner,
        state: TrainState,
        terms: Sequence[dict[str, Tensor]],
        lr: float,
        gradient_norm: float,
    ) -> None:
        """Count a step; every so many, average the terms over micro-batches, steps and ranks and write them down."""
        self.meter.add(terms)
        if self.first:
            epoch = (state.step - 1) // self.steps_per_epoch + 1
            self.bar.set_description(f"epoch {epoch}/{self.config.schedule.epochs}", refresh=False)
            self.bar.update()
        if state.step % self.config.logging.every_steps == 0 or state.step == self.total_steps:
            values = learner.derive(self.meter.read())
            values |= {"lr": lr, "gradient_norm": gradient_norm, "images_per_second": self._rate(state)}
            self.record("train", state.step, values)
            self._warn(learner.warning(values), state.step)

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write one line of metrics.jsonl, show it and pass it to the trackers."""
        if not self.first:
            return
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()
        if kind == "train":
            shown = {key: f"{values[key]:.4g}" for key in SHOWN if key in values}
            self.bar.set_postfix(shown, refresh=False)
        else:
            self.say("  ".join([kind, f"step {step}", *(f"{name} {value:g}" for name, value in values.items())]))
        for tracker in self.trackers:
            tracker.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.first:
            self.bar.write(message)

    def _warn(self, warning: str | None, step: int) -> None:
        """Say a warning, at most once an epoch."""
        epoch = (step - 1) // self.steps_per_epoch
        if warning and epoch != self.warned:
            self.warned = epoch
            self.say(f"WARNING: step {step}: {warning}")

    def _rate(self, state: TrainState) -> float:
        """Images per second since the last call, over all ranks."""
        (then, seen), now = self.window, time.perf_counter()
        self.window = (now, state.samples_seen)
        return (state.samples_seen - seen) / (now - then)


def _sign(name: str) -> int:
    return -1 if name.endswith("_min") else 1


def _all_reduce(tensors: dict[str, Tensor], operation: dist.ReduceOp) -> dict[str, Tensor]:
    """The tensors reduced over all ranks in one collective, on the CPU."""
    if not tensors:
        return {}
    packed = torch.cat([tensor.flatten() for tensor in tensors.values()])
    dist.all_reduce(packed, operation)
    parts = packed.cpu().split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view_as(tensor) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


def _open_metrics(path: Path, step: int) -> TextIO:
    """Open for appending, without the lines of steps that a resumed run is about to take again."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    return path.open("a")


def _start_tracker(name: str, run: Path, config: Config) -> GeneralTracker:
    if name == "wandb":
        tracker = WandBTracker(config.name, config=config.model_dump(mode="json"), dir=str(run))
    else:
        tracker = TensorBoardTracker("tensorboard", str(run))
    tracker.start()
    return tracker
