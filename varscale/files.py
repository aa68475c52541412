"""Small files that are never half written, and data that has reached the disk."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a restart after a power cut, finds the old contents or the new."""
    aside = path.with_name(f".writing-{path.name}")
    aside.write_text(text)
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
