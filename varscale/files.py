"""Small files that are never half written, and data that has reached the disk."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ASIDE = ".writing-"


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, so that a power cut does not take their names."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a restart after a power cut, finds the old contents or the new."""
    aside = path.with_name(f"{_ASIDE}{path.name}")
    aside.write_text(text)
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def replace_link(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target`: at any time, also after a power cut, it leads to the old or the new."""
    aside = path.with_name(f"{_ASIDE}{path.name}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.replace(path)
    sync(path.parent)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block for the folder; where its file system has no locks, do not."""
    with open(folder / f"{_ASIDE}lock", "a") as file:  # NFS locks only what is open for writing
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_unfinished(path: Path) -> bool:
    """Whether a file is what an interrupted call of these left."""
    return path.name.startswith(_ASIDE)


def let_others_read(path: Path) -> None:
    """Give a file the permissions of a new one, which the umask limits; safetensors lets its owner alone read."""
    found = re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    path.chmod(0o666 & ~(int(found[1], 8) if found else 0o022))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
