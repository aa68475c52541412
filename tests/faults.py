"""Ranks with one fault each: everything else about them is real."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def rank_main(
    arguments: list[str], rank: int, ranks: int, port: int, log: Path, *, fault: Callable[[int, int], None]
) -> None:
    """As torture's, once `fault(rank, ranks)` has prepared what will go wrong."""
    from torture import rank_main as sound_rank_main

    fault(rank, ranks)
    sound_rank_main(arguments, rank, ranks, port, log)


def nan_loss(rank: int, ranks: int, *, bad: tuple[int, ...]) -> None:
    """On the last rank the loss of the `bad` steps, counted from 1 since its start, is NaN."""
    from varscale.engine import learners

    build, step = learners.build_learner, 0

    def build_learner(*arguments):
        learner = build(*arguments)
        real_loss = learner.loss

        def loss(forward, batch):
            nonlocal step
            step += 1
            loss, terms = real_loss(forward, batch)
            is_bad = step in bad and rank == ranks - 1
            return loss, terms | {"kl": terms["kl"] * float("nan")} if is_bad else terms

        learner.loss = loss
        return learner

    learners.build_learner = build_learner


def counting_engines(rank: int, ranks: int, *, bad: tuple[int, ...]) -> None:
    """As nan_loss, and each time an engine is opened it is told how many others still live."""
    from weakref import WeakSet

    from varscale.engine import opening

    nan_loss(rank, ranks, bad=bad)
    open_engine, engines = opening.open_engine, WeakSet()

    def open_and_count(*arguments):
        print(f"engines: {len(engines)}", flush=True)
        engine = open_engine(*arguments)
        engines.add(engine)
        return engine

    opening.open_engine = open_and_count


def no_room(rank: int, ranks: int, *, step: int) -> None:
    """The checkpoint of `step` can never be written."""
    from varscale.engine import saving

    write = saving.write_checkpoint
    saving.LAST_RETRY_AFTER = 0.1

    def write_checkpoint(run, number, *others):
        if number == step:
            raise OSError("no room for it")
        return write(run, number, *others)

    saving.write_checkpoint = write_checkpoint


def dead_loader(rank: int, ranks: int, *, step: int) -> None:
    """The last rank's loader never comes back with the images of `step`."""
    from varscale.data import loader

    real_batches = loader.ViewLoader.batches

    def batches(self, plan, epoch):
        for number, batch in enumerate(real_batches(self, plan, epoch), start=1):
            if number == step and rank == ranks - 1:
                time.sleep(600)
            yield batch

    loader.ViewLoader.batches = batches


def full_disk(rank: int, ranks: int, *, disk: Path, full: int, free: int) -> None:
    """The file system of `disk` is full from step `full` to step `free`; what failed is tried again at once."""
    from varscale import train
    from varscale.engine import saving

    saving.RETRY_AFTER = 0.0
    take_step, step = train.take_step, 0

    def take_and_fill(*arguments):
        nonlocal step
        step += rank == 0
        if step == full:
            with suppress(OSError), (disk / "fill").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**20))
        elif step == free:
            (disk / "fill").unlink()
        return take_step(*arguments)

    train.take_step = take_and_fill


def silent(arguments: list[str], rank: int, ranks: int, port: int, log: Path) -> None:
    """A rank whose output goes to a full disk."""
    from torture import rank_main as sound_rank_main

    sound_rank_main(arguments, rank, ranks, port, Path("/dev/full"))
