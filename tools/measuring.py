"""What the benchmarks measure alike."""

from collections.abc import Callable
from pathlib import Path


def resident_growth(work: Callable[[], object]) -> int:
    """Bytes by which this process's resident memory rises at most while `work` runs (Linux).

    Resets the kernel's high-water mark first: that of `getrusage` outlives even the start of another program.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
