"""What a source consists of: two splits of labelled images, none of them decoded before it is asked for."""

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from varscale.data.images import Content
from varscale.errors import UserError

MOST_EMPTY_CLASSES = 100_000  # a part of a data set may keep the numbers of the whole
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class Names(Sequence[str]):
    """Text as one run of bytes: a million file names take their length and 8 bytes each."""

    def __init__(self, names: Iterable[str]) -> None:
        self.text, self._ends = bytearray(), array("q", [0])
        for name in names:
            self.text += name.encode("utf-8", "surrogateescape")
            self._ends.append(len(self.text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start, end = self._ends[index], self._ends[index + 1]
        return self.text[start:end].decode("utf-8", "surrogateescape")

    def identity(self) -> Iterator[bytes]:
        yield self.text
        yield self._ends.tobytes()


class Split(Protocol):
    """Labelled images in a fixed order, none of them decoded before it is asked for."""

    labels: np.ndarray  # (N,) int64

    def content(self, index: int) -> Content:
        """Where the image is to be read, or the image itself."""

    def name(self, index: int) -> str:
        """What people call this image: its path relative to the source, or its place in an array."""

    def identity(self) -> Iterator[bytes]:
        """What tells this split from others, as far as listing it shows."""


@dataclass(frozen=True)
class ArraySplit:
    """Images of one size in memory: (N, height, width, 3) or (N, height, width) uint8."""

    images: np.ndarray
    labels: np.ndarray
    array_name: str

    def content(self, index: int) -> np.ndarray:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"{self.array_name}[{index}]"

    def identity(self) -> Iterator[bytes]:
        yield str(self.images.shape).encode()
        yield np.ascontiguousarray(self.images).data
        yield self.labels.tobytes()


@dataclass(frozen=True)
class FileSplit:
    """Image files under the source's folder, by their paths relative to it."""

    folder: Path
    files: Names
    labels: np.ndarray

    def content(self, index: int) -> str:
        return os.path.join(self.folder, self.files[index])

    def name(self, index: int) -> str:
        return self.files[index]

    def identity(self) -> Iterator[bytes]:
        yield from self.files.identity()
        yield self.labels.tobytes()


@dataclass(frozen=True)
class SubsetSplit:
    """Some images of another split, by their `rows: (n,) int64` in it."""

    whole: Split
    rows: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return self.whole.labels[self.rows]

    def content(self, index: int) -> Content:
        return self.whole.content(int(self.rows[index]))

    def name(self, index: int) -> str:
        return self.whole.name(int(self.rows[index]))

    def identity(self) -> Iterator[bytes]:
        yield from self.whole.identity()
        yield self.rows.tobytes()


def first_of_each_class(split: Split, count: int) -> SubsetSplit:
    """The first `count` images of each class, or all of a class that has fewer, in the split's order."""
    order = np.argsort(split.labels, kind="stable")
    labels = split.labels[order]
    place_in_class = np.arange(len(labels)) - np.searchsorted(labels, labels)
    return SubsetSplit(split, np.sort(order[place_in_class < count]))


@dataclass(frozen=True)
class Source:
    """A data set to convert: its classes' names, and the two splits; `notes` are for the person to read."""

    spec: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    options: dict[str, int | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> Split:
        """`train` or `val`."""
        return {"train": self.train, "val": self.val}[name]


def check_same_classes(place: str, train: list[str], val: list[str]) -> None:
    """Raises UserError, naming some, where a class is in one of the splits only."""
    one_sided = sorted(set(train) ^ set(val))
    if one_sided:
        told = ", ".join(f"{name} only in {'train' if name in train else 'val'}" for name in one_sided[:5])
        more = f" and {len(one_sided) - 5} more" if len(one_sided) > 5 else ""
        raise UserError(f"{place}: train and val must have the same class folders ({told}{more})")


def is_image(name: str, ignored: Counter[str]) -> bool:
    """Whether a file is a JPEG or PNG by its name; one that is not is counted in `ignored` by its suffix."""
    if name.lower().endswith(IMAGE_SUFFIXES):
        return True
    ignored[os.path.splitext(name)[1]] += 1
    return False


def ignored_note(ignored: Counter[str]) -> tuple[str, ...]:
    """What to tell a person of files that are no images, counted by suffix."""
    kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in ignored.most_common(5))
    return (f"ignored {ignored.total():,} files that are not .jpg, .jpeg or .png: {kinds}",) if ignored else ()


def numbered_classes(labels: np.ndarray, place: str) -> tuple[str, ...]:
    """Names of classes that have only numbers. Raises UserError for a number that must be a mistake."""
    largest = int(labels.max())
    if largest >= max(len(labels), MOST_EMPTY_CLASSES):
        raise UserError(f"{place}: the largest label is {largest:,}, but there are {len(labels):,} images of training")
    return tuple(map(str, range(largest + 1)))
