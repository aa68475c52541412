"""How much memory this process may still take."""

from pathlib import Path

import psutil

CONTROL_GROUP = Path("/sys/fs/cgroup")  # as a container or a SLURM job sees its own


def available_memory() -> int:
    """Bytes that can be had without swapping, files that the system caches included: the machine's, or its group's."""
    available = psutil.virtual_memory().available
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text())
        used = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return available
    return min(available, max(0, limit - int(used["anon"])))
