"""Noticing that nothing happens any more: every rank then shows where it stands and ends, to be started again."""

import faulthandler
import os
import sys
import threading
import time
from typing import Self

from varscale.engine.distributed import Ranks
from varscale.engine.stopping import PREEMPTED

FAREWELL = 5.0  # seconds in which the other ranks, which hang in the same place, can show theirs before a launcher acts


class Watchdog:
    """Ends the process with code PREEMPTED when `beat` was not called for `seconds`; 0 seconds: never.

    A context manager around the training loop. It finds a collective that one rank does not come to, a loader or a file
    system that does not answer, and prints the stack of every thread and the last step before it ends the process.
    """

    def __init__(self, seconds: float, ranks: Ranks) -> None:
        self.seconds, self.ranks = seconds, ranks
        self.step = 0
        self.ended = threading.Event()
        self.beat()

    def __enter__(self) -> Self:
        if self.seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    def beat(self, step: int | None = None) -> None:
        """Tell that all is well, and which optimizer step was taken last."""
        self.step = self.step if step is None else step
        self.beaten_at = time.monotonic()

    def _watch(self) -> None:
        while True:
            left = self.beaten_at + self.seconds - time.monotonic()
            if left <= 0:
                break
            if self.ended.wait(left):
                return
        rank, world_size = self.ranks.rank, self.ranks.world_size
        print(
            f"\nwatchdog: rank {rank} of {world_size} on {os.uname().nodename} has done nothing for {self.seconds:g} s "
            f"(safety.watchdog_seconds); its last step was {self.step}. Where it stands:",
            file=sys.stderr,
        )
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(FAREWELL)
        os._exit(PREEMPTED)
