"""Folders of image files, one a class."""

import os
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from varscale.data.sources.splits import FileSplit, Names, Source, check_same_classes, ignored_note, is_image
from varscale.errors import UserError


def open_imagefolder(spec: str, location: str) -> Source:
    """train/ and val/ with one folder a class, of JPEG and PNG files at any depth, in torchvision's order."""
    root = Path(location)
    found = sorted(folder.name for folder in _folders(root))
    for split in ("train", "val"):
        if split not in found:
            raise UserError(f"{root} has no folder '{split}' (its folders: {', '.join(found[:5]) or 'none'})")
    classes, other = (sorted(folder.name for folder in _folders(root / split)) for split in ("train", "val"))
    check_same_classes(location, classes, other)
    if not classes:
        raise UserError(f"{root / 'train'} has no class folders")
    ignored: Counter[str] = Counter()
    train, val = (_file_split(root, split, classes, ignored) for split in ("train", "val"))
    return Source(spec, tuple(classes), train, val, notes=ignored_note(ignored))


def _folders(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None


def _file_split(root: Path, split: str, classes: list[str], ignored: Counter[str]) -> FileSplit:
    labels = array("q")

    def files() -> Iterator[str]:
        for label, name in enumerate(classes):
            folder, before = root / split / name, len(labels)
            for path in _image_files(folder, ignored):
                labels.append(label)
                yield os.path.relpath(path, root)
            if len(labels) == before:
                raise UserError(f"the class folder {folder} holds no .jpg, .jpeg or .png file")

    return FileSplit(root, Names(files()), np.array(labels))


def _image_files(folder: Path, ignored: Counter[str]) -> Iterator[str]:
    """All image files at any depth, hidden ones aside; other files are counted by suffix in `ignored`."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    visited, levels = set(), []
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            raise UserError(f"{parent} is a link to a folder that is already part of {folder}")
        visited.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        levels.append((parent, sorted(name for name in files if not name.startswith("."))))
    # In the order of torchvision's ImageFolder, so that sample i here is sample i there.
    for parent, files in sorted(levels):
        for name in files:
            if is_image(name, ignored):
                yield os.path.join(parent, name)
