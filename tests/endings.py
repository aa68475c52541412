"""How the tests of failures say that something ends: soon, and leaving nothing."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ends_cleanly(seconds: float = 5) -> Iterator[None]:
    """A block that ends within so many seconds, or is ended, and leaves no thread and no open file behind."""
    threads, files = set(threading.enumerate()), os.listdir("/proc/self/fd")
    with _time_limit(seconds):
        yield
    assert set(threading.enumerate()) <= threads
    assert os.listdir("/proc/self/fd") == files


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"this did not end within {seconds} s")

    handler = signal.signal(signal.SIGALRM, late)
    rest, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # pytest-timeout's
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, rest)
        signal.signal(signal.SIGALRM, handler)
