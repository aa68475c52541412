"""Where images come from: digits, CIFAR, .npz archives and class folders, as lazy sequences of labelled images."""

import difflib
import hashlib
import os
import socket
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from varscale.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
DIGIT_SIZES = (32, 16)
KINDS = ("digits", "cifar10", "cifar100", "npz:FILE", "imagefolder:DIR")


class Split(Protocol):
    """Labelled images in a fixed order, none of them decoded before it is asked for."""

    labels: np.ndarray  # (N,) int64

    def content(self, index: int) -> str | np.ndarray:
        """A path of a JPEG or PNG file, or a uint8 array (height, width, 3) or (height, width)."""

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
    files: list[str]
    labels: np.ndarray

    def content(self, index: int) -> str:
        return os.path.join(self.folder, self.files[index])

    def name(self, index: int) -> str:
        return self.files[index]

    def identity(self) -> Iterator[bytes]:
        yield "\0".join(self.files).encode("utf-8", "surrogateescape")
        yield self.labels.tobytes()


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


def open_source(spec: str, *, image_size: int | None = None, download_dir: Path | None = None) -> Source:
    """Opens a source by its name.

    Args:
        spec: `digits`, `cifar10`, `cifar100`, `npz:FILE` or `imagefolder:DIR`.
        image_size: side of the digits' images, 32 (default) or 16; for `digits` only.
        download_dir: where CIFAR's archives lie or are downloaded to; for `cifar10` and `cifar100` only.

    Raises:
        UserError: no such source; an option of another source; files missing, unreadable or of the wrong form; fewer
            than two classes; equal names; a class without images in train or in val.
    """
    kind, _, location = spec.partition(":")
    if image_size is not None and kind != "digits":
        raise UserError(f"--image-size is for the source digits only, not for {spec}; see --max-resolution")
    if download_dir is not None and kind not in ("cifar10", "cifar100"):
        raise UserError(f"--download-dir is for the sources cifar10 and cifar100 only, not for {spec}")
    if kind in ("npz", "imagefolder") and location:
        source = (_npz if kind == "npz" else _imagefolder)(spec, Path(location))
    elif spec in ("cifar10", "cifar100"):
        source = _cifar(spec, download_dir or Path.home() / ".cache" / "varscale")
    elif spec == "digits":
        source = _digits(image_size or DIGIT_SIZES[0])
    else:
        raise UserError(f"unknown source '{spec}'{_hint(spec, kind)}; accepted: {', '.join(KINDS)}")
    _check_classes(source)
    return source


def _hint(spec: str, kind: str) -> str:
    if os.path.isdir(spec):
        return f" (for a folder with train/ and val/ write imagefolder:{spec})"
    if spec.endswith(".npz"):
        return f" (for an archive of arrays write npz:{spec})"
    near = difflib.get_close_matches(kind.lower(), [known.partition(":")[0] for known in KINDS], n=1)
    return f" (did you mean {next(known for known in KINDS if known.startswith(near[0]))}?)" if near else ""


def _check_classes(source: Source) -> None:
    if len(source.classes) < 2:
        raise UserError(f"{source.spec}: only one class ({source.classes[0]}); at least two are needed")
    twice = [name for name, count in Counter(source.classes).items() if count > 1]
    if twice:
        raise UserError(f"{source.spec}: the class name '{twice[0]}' occurs more than once")
    for split in ("train", "val"):
        counts = np.bincount(getattr(source, split).labels, minlength=len(source.classes))
        if not counts.all():
            raise UserError(f"{source.spec}: class '{source.classes[int(np.argmin(counts))]}' has no images in {split}")


def _digits(size: int) -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, enlarged bicubically, a stratified fifth held out."""
    from sklearn.datasets import load_digits

    if size not in DIGIT_SIZES:
        raise UserError(f"--image-size {size}: the digits are made in sizes {' and '.join(map(str, DIGIT_SIZES))}")
    digits = load_digits()
    # 17 grey levels to 256, then Pillow's fixed-point resampling: the same bytes on every machine.
    levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    enlarged = [np.asarray(Image.fromarray(level).resize((size, size), Image.Resampling.BICUBIC)) for level in levels]
    images = np.repeat(np.stack(enlarged)[..., None], 3, axis=3)
    labels = digits.target.astype(np.int64)
    held_out = np.zeros(len(labels), bool)
    for digit in range(10):
        # A fixed random order that no library's next version can change.
        members = np.flatnonzero(labels == digit).tolist()
        members.sort(key=lambda index: hashlib.sha256(f"held-out digits {index}".encode()).digest())
        held_out[members[: round(len(members) / 5)]] = True
    train, val = (ArraySplit(images[chosen], labels[chosen], "digits") for chosen in (~held_out, held_out))
    return Source("digits", tuple(str(digit) for digit in range(10)), train, val, {"image_size": size})


def _cifar(name: str, folder: Path) -> Source:
    """CIFAR-10 or CIFAR-100 (fine labels) by torchvision, from the folder or else from the network."""
    from torchvision.datasets import CIFAR10, CIFAR100

    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        with _network_timeout(30):
            train, val = (dataset(str(folder), train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError, EOFError) as error:  # torchvision reports a wrong checksum by RuntimeError
        with suppress(OSError):  # torchvision makes the folder first
            folder.rmdir()
        raise UserError(
            f"{name}: no complete copy in {folder}, and downloading it failed ({' '.join(str(error).split())}); put "
            f"{dataset.url} into a folder and pass --download-dir FOLDER, or convert arrays by npz:FILE"
        ) from None
    splits = (
        ArraySplit(part.data, np.array(part.targets, np.int64), f"{name} {split}")
        for split, part in (("train", train), ("test", val))
    )
    return Source(name, tuple(train.classes), *splits)


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Ends a download that stands still; torchvision itself would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _npz(spec: str, path: Path) -> Source:
    """An archive of x_train, y_train, x_test, y_test and optionally names, as numpy.savez makes it."""
    arrays = _load_npz(path)
    for key in ("x_train", "y_train", "x_test", "y_test"):
        if key not in arrays:
            raise UserError(f"{path} has no array '{key}' (it has: {', '.join(arrays) or 'nothing'})")
    train, val = (_array_split(path, arrays, split) for split in ("train", "test"))
    if "names" in arrays:
        names = arrays["names"]
        if names.ndim != 1 or names.dtype.kind not in "US" or not names.size:
            raise UserError(f"{path}: 'names' is {names.shape} {names.dtype}, but must be (classes,) text")
        classes = tuple(name.decode() if isinstance(name, bytes) else name for name in names.tolist())
    else:
        classes = tuple(str(label) for label in range(int(train.labels.max()) + 1))
    for key, split in (("y_train", train), ("y_test", val)):
        wrong = (split.labels < 0) | (split.labels >= len(classes))
        if wrong.any():
            first = int(np.argmax(wrong))
            raise UserError(
                f"{path}: {key}[{first}] is {split.labels[first]}, but there are {len(classes)} classes "
                f"(labels 0 to {len(classes) - 1}, {'by names' if 'names' in arrays else 'by the largest in y_train'})"
            )
    return Source(spec, classes, train, val)


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    wanted = ("x_train", "y_train", "x_test", "y_test", "names")
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise UserError(f"{path} holds a single array, not an .npz archive of x_train, y_train, x_test, y_test")
            # Only what is used is read; other arrays are named, for the message.
            return {key: archive[key] if key in wanted else np.empty(0) for key in archive.files}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is not a complete .npz archive of plain arrays: {error}") from None


def _array_split(path: Path, arrays: dict[str, np.ndarray], split: str) -> ArraySplit:
    images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[3:] not in ((), (3,)) or not images.size:
        raise UserError(
            f"{path}: 'x_{split}' is {images.shape} {images.dtype}, but must be uint8 (values 0 to 255) of shape "
            "(images, height, width, 3) or (images, height, width)"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise UserError(f"{path}: 'y_{split}' is {labels.shape} {labels.dtype}, but must be ({len(images)},) integer")
    return ArraySplit(images, labels.astype(np.int64), f"x_{split}")


def _imagefolder(spec: str, root: Path) -> Source:
    """train/ and val/ with one folder a class, of JPEG and PNG files at any depth, in torchvision's order."""
    found = sorted(folder.name for folder in _folders(root))
    for split in ("train", "val"):
        if split not in found:
            raise UserError(f"{root} has no folder '{split}' (its folders: {', '.join(found[:5]) or 'none'})")
    classes, other = (sorted(folder.name for folder in _folders(root / split)) for split in ("train", "val"))
    if classes != other:
        one_sided = sorted(set(classes) ^ set(other))
        told = ", ".join(f"{name} only in {'train' if name in classes else 'val'}" for name in one_sided[:5])
        more = f" and {len(one_sided) - 5} more" if len(one_sided) > 5 else ""
        raise UserError(f"{root}: train and val must have the same class folders ({told}{more})")
    if not classes:
        raise UserError(f"{root / 'train'} has no class folders")
    ignored: Counter[str] = Counter()
    train, val = (_file_split(root, split, classes, ignored) for split in ("train", "val"))
    kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in ignored.most_common(5))
    notes = (f"ignored {ignored.total():,} files that are not .jpg, .jpeg or .png: {kinds}",) if ignored else ()
    return Source(spec, tuple(classes), train, val, notes=notes)


def _folders(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None


def _file_split(root: Path, split: str, classes: list[str], ignored: Counter[str]) -> FileSplit:
    files, labels = [], []
    for label, name in enumerate(classes):
        folder = root / split / name
        members = [os.path.relpath(path, root) for path in _image_files(folder, ignored)]
        if not members:
            raise UserError(f"the class folder {folder} holds no .jpg, .jpeg or .png file")
        files += members
        labels.append(np.full(len(members), label, np.int64))
    return FileSplit(root, files, np.concatenate(labels))


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
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield os.path.join(parent, name)
            else:
                ignored[Path(name).suffix] += 1
