"""Noticing that nothing happens any more: every rank then shows where it stands and ends, to be started again."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn, Self

from varscale.engine.distributed import Ranks, announced_failure
from varscale.engine.stopping import PEER_FAILED, PREEMPTED

LOOK = 5.0  # seconds between two looks for a rank that left word that it failed
GRACE = 30.0  # seconds in which a rank whose collectives break, too, ends by itself, and writes what it can
COMPILING = 3600.0  # seconds more for the first step where it is compiled
FAREWELL = 5.0  # seconds in which the other ranks, which hang in the same place, can show theirs before a launcher acts


class Watchdog:
    """Ends the process when `beat` was not called for `seconds`; 0 seconds: never.

    A context manager around the training loop. It finds a collective that one rank does not come to, a loader or a file
    system that does not answer, and prints the stack of every thread and the last step before it ends the process with
    code PREEMPTED. Where another rank left word that it failed, that is the reason, and the code PEER_FAILED, some
    seconds after: with NCCL the others would wait for it as long as it takes.
    """

    def __init__(self, seconds: float, ranks: Ranks, *, compiles: bool = False) -> None:
        self.seconds, self.ranks = seconds, ranks
        self.allowance = COMPILING if compiles else 0.0
        self.step = 0
        self.ended = threading.Event()

    def __enter__(self) -> Self:
        self.beat()
        if self.seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    def beat(self, step: int | None = None) -> None:
        """Tell that all is well, and which optimizer step was done last."""
        if step is not None:
            self.step, self.allowance = step, 0.0
        self.beaten_at = time.monotonic() + self.allowance

    def _watch(self) -> None:
        while (left := self.beaten_at + self.seconds - time.monotonic()) > 0:
            if self.ended.wait(min(left, LOOK)):
                return
            if cause := _within(LOOK, lambda: announced_failure(wait=0)):
                if self.ended.wait(GRACE):
                    return
                _end_because_of(cause)
        if cause := _within(FAREWELL, announced_failure):
            _end_because_of(cause)
        rank, world_size = self.ranks.rank, self.ranks.world_size
        print(
            f"\nwatchdog: rank {rank} of {world_size} on {os.uname().nodename} has done nothing for {self.seconds:g} s "
            f"(safety.watchdog_seconds); the last step it saw done was {self.step}. Where it stands:\n{_stacks()}",
            file=sys.stderr,
        )
        time.sleep(FAREWELL)
        os._exit(PREEMPTED)


def _stacks() -> str:
    """Of all threads, to be printed in one piece: faulthandler writes a word at a time, and the ranks share a log."""
    with open(os.memfd_create("stacks"), "w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def _end_because_of(cause: str) -> NoReturn:
    print(f"error: another rank failed: {cause}", file=sys.stderr)
    os._exit(PEER_FAILED)


def _within(seconds: float, question: Callable[[], str | None]) -> str | None:
    """The answer if it comes in time: whom the question goes to may be what hangs."""
    answers: list[str | None] = []
    threading.Thread(target=lambda: answers.append(question()), daemon=True).start()
    deadline = time.monotonic() + seconds
    while not answers and time.monotonic() < deadline:
        time.sleep(0.05)
    return answers[0] if answers else None
