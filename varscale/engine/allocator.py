"""How the C library treats memory that torch frees on a CPU."""

import ctypes
import os

# malloc.h of the GNU C library
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")

_is_kept = False


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed for the next step, which wants the same sizes; whether it does from now on.

    Otherwise every tensor above 32 MiB is mapped anew, and the kernel clears each of its pages when it is first
    written: benchmarks/train.md has what that costs, and how much larger the process grows. Only the GNU C library can,
    and one that the environment tells what to do, by `OWN_SETTINGS` or tunables, is left alone.
    """
    global _is_kept
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    told = any(name in os.environ for name in OWN_SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if mallopt is not None and not told:
        _is_kept = all(mallopt(*option) for option in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)))
    return _is_kept


def give_back_memory() -> None:
    """Where it is kept, return what is free to the system: pieces that fit no request any more would add up."""
    if _is_kept:
        ctypes.CDLL(None).malloc_trim(0)
