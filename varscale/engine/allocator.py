"""How the C library treats memory that torch frees on a CPU."""

import ctypes
import os

# malloc.h of the GNU C library
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed for the next step, which wants the same sizes; whether that is so from now on.

    Otherwise every tensor above 32 MiB is mapped anew, and the kernel clears each of its pages when it is first
    written: benchmarks/train.md has what that costs, and how much larger the process grows. Only the GNU C library can,
    and one that a variable of `OWN_SETTINGS` tells what to do is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in OWN_SETTINGS):
        return False
    return all(mallopt(*option) for option in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)))


def give_back_memory() -> None:
    """Return what is free to the system, once in a while: pieces that fit no request any more would add up."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
