"""Saving while training goes on: a thread writes the checkpoints, one at a time; what failed is tried again."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from varscale.engine.checkpoints import NotDeletedError, Tensors, mark_best, write_checkpoint
from varscale.engine.distributed import Ranks

RETRY_AFTER = 60.0  # seconds from a failure to the next attempt, where no checkpoint is due before
LAST_RETRIES, LAST_RETRY_AFTER = 3, 5.0  # at the end of a run, which has nothing else to do


class CheckpointWriter:
    """Writes a run's checkpoints in the background, on rank 0; on other ranks it does nothing.

    A context manager: leaving it waits for the last. Where that one counts, `finish` first.

    warn: takes the message of a checkpoint that could not be written. The older ones are then untouched, training goes
        on, and RETRY_AFTER seconds later `retry_is_due`.
    """

    def __init__(self, run: Path, keep: int, ranks: Ranks, warn: Callable[[str], None]) -> None:
        self.run, self.keep, self.first, self.warn = run, keep, ranks.is_first, warn
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self.writing: Future | None = None
        self.last: tuple[int, Mapping[str, Tensors], dict] | None = None  # until it is on the disk
        self.failed_at: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self.thread.shutdown()

    def write(self, step: int, parts: Mapping[str, Tensors], state: dict) -> None:
        """Begin to write what must not change any more. Waits first for the one before, if that takes so long."""
        if not self.first:
            return
        self.wait()
        self.last = (step, parts, state)
        self._begin()

    def mark_best(self, step: int) -> None:
        """Point `best` at the checkpoint of `step`, the last one handed to `write`, if it could be written."""
        if not self.first:
            return
        self.wait()
        try:
            mark_best(self.run, step)
        except OSError as error:
            self.warn(f"step {step} has the best accuracy, but cannot be marked so: {error}")

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self.writing is not None:
            self._finish(self.writing)

    def finish(self) -> bool:
        """Wait for the last checkpoint, trying a few times if it fails; whether it is written."""
        self.wait()
        for _ in range(LAST_RETRIES):
            if self.last is None:
                break
            time.sleep(LAST_RETRY_AFTER)
            self._begin()
            self.wait()
        return self.last is None

    @property
    def retry_is_due(self) -> bool:
        """Whether the last checkpoint failed a while ago, so that another attempt should be made."""
        if self.writing is not None and self.writing.done():
            self._finish(self.writing)
        return self.failed_at is not None and time.monotonic() - self.failed_at > RETRY_AFTER

    def _begin(self) -> None:
        step, parts, state = self.last
        self.writing = self.thread.submit(write_checkpoint, self.run, step, parts, state, self.keep)

    def _finish(self, writing: Future) -> None:
        self.writing = self.failed_at = None
        try:
            writing.result()
            self.last = None
        except NotDeletedError as error:
            self.last = None
            self.warn(str(error))
        except OSError as error:
            self.failed_at = time.monotonic()
            self.warn(f"no checkpoint could be written ({error}); training goes on and will try again")
