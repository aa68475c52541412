"""metrics.jsonl: one JSON object a line, cut back to where a resumed run goes on, patient with a full disk."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# What tells of the clock and the machine in lines of training: it differs each time the same is run. See throughput.py.
MEASURED = (
    "images_per_second",
    "views_per_second",
    "step_ms_p50",
    "step_ms_p90",
    "step_ms_max",
    "data_wait_share",
    "tflops",
    "mfu",
    "process_memory_peak_gib",
    "device_memory_peak_gib",
)


class MetricsFile:
    """Appends lines; what cannot be written waits for the next attempt, so that a full disk ends no run.

    position: where the file ends for the run to be resumed, in bytes: lines behind it belong to steps that will be
        taken again, and are dropped. warn: takes a message, at the first failure of several in a row.
    """

    def __init__(self, path: Path, position: int, warn: Callable[[str], None]) -> None:
        self.path, self.warn = path, warn
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.position = min(position, os.fstat(self.file).st_size)
        os.ftruncate(self.file, self.position)
        self.waiting = b""
        self.failing = False

    def write(self, line: dict) -> None:
        """Append one line, and those that could not be written before."""
        self.waiting += json.dumps(line).encode() + b"\n"
        try:
            written = os.pwrite(self.file, self.waiting, self.position)
            if written < len(self.waiting):  # the disk is full now; the next attempt says so
                os.pwrite(self.file, self.waiting[written:], self.position + written)
        except OSError as error:
            if not self.failing:
                self.warn(f"{self.path} cannot be written ({error}); training goes on and will try again")
            self.failing = True
            return
        self.position += len(self.waiting)
        self.waiting, self.failing = b"", False

    def sync(self) -> None:
        """Wait until all lines that could be written are on the disk."""
        with suppress(OSError):  # the next `write` will fail, too, and tell
            os.fsync(self.file)

    def close(self) -> None:
        """Close the file."""
        os.close(self.file)
