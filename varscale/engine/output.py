"""What a program prints must not end it: on a full disk, or behind a closed pipe, only the words are lost."""

import io
import sys
from typing import TextIO


class _Patient(io.FileIO):
    """A file that takes what cannot be written for written."""

    def write(self, content: object) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def outlive_output() -> None:
    """Let no write to standard output or standard error fail from now on, nor the flush at the end of the process.

    Each line is written at once: a log shows what has happened. Streams that somebody put in their place stay.
    """
    if sys.stdout is sys.__stdout__:
        sys.stdout = _patient(sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _patient(sys.stderr)


def _patient(stream: TextIO | None) -> TextIO | None:
    if stream is None:  # the process was started without it
        return None
    raw = _Patient(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=True)
