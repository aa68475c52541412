"""How much memory this process may still take."""

from pathlib import Path

import psutil

from varscale.errors import UserError

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
# Version 1, whose groups for memory are a tree of their own, and version 2: limit, and what of the use is not cache.
FORMS = {True: ("memory.limit_in_bytes", "total_rss"), False: ("memory.max", "anon")}


def available_memory() -> int:
    """Bytes that can be had without swapping, files that the system caches included: the machine's, or less where a
    control group of this process (a container's, a Slurm job's), or one around it, sets a limit."""
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def can_be_cached(path: Path) -> bool:
    """Whether a file fits into the memory that is free."""
    return path.stat().st_size <= available_memory()


def check_cached(path: Path) -> None:
    """Raises UserError where a file does not fit into the memory that is free."""
    if not can_be_cached(path):
        raise UserError(
            f"{path} has {_gigabytes(path.stat().st_size)}, but only {_gigabytes(available_memory())} of memory are "
            "free to cache it: set data.os_cache=false to stream it"
        )


def _left_in_groups() -> list[int]:
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            left += _left_on_the_way(CONTROL_GROUPS / "memory", path, first_version=True)
        elif not controllers:
            for root in (CONTROL_GROUPS, CONTROL_GROUPS / "unified"):
                left += _left_on_the_way(root, path, first_version=False)
    return left


def _left_on_the_way(root: Path, path: str, *, first_version: bool) -> list[int]:
    """What is left in a group and in those around it, up to the root of what this process sees."""
    # A container may see its own group as the root, under which the path as its host has it does not exist.
    group = root / path.lstrip("/").replace("../", "")
    groups = [group, *group.parents[: len(group.parts) - len(root.parts)]]
    limit_file, used_key = FORMS[first_version]
    left = []
    for folder in groups:
        try:
            limit = int((folder / limit_file).read_text())
            used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left.append(max(0, limit - int(used[used_key])))
        except (OSError, ValueError, KeyError):  # no such group, or no limit ("max")
            continue
    return left


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
