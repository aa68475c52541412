"""The .beton file format of FFCV 1.0 for labelled images: a sequential writer, and a checker that needs no FFCV.

A .beton is: header, field descriptors, one metadata record a sample, the samples' bytes in pages, and a table of the
allocations (sample, pointer, size) that runs to the end of the file. FFCV's streaming reader loads page by page, so
that no sample's bytes may cross a multiple of the page size.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from varscale.config import OBJECTIVES
from varscale.data.names import sample_title
from varscale.errors import UserError

BETON_VERSION = 2
MODE_JPEG, MODE_RAW = 0, 1
MAX_SIDE = 2**16 - 1  # height and width are 16-bit fields
SMALLEST_PAGE = 2**21
LARGEST_PAGE = 2**31  # the page size is a 32-bit field

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table", "<u8")],
    align=True,
)
FIELD = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
POINTER_AND_SIZE = np.dtype([("pointer", "<u8"), ("size", "<u8")])

FLOAT_ID, INT_ID, IMAGE_ID, BYTES_ID, ARRAY_ID, JSON_ID, TENSOR_ID = range(7)
RECORDS = {
    FLOAT_ID: np.dtype("<f8"),
    INT_ID: np.dtype("<i8"),
    IMAGE_ID: IMAGE,
    BYTES_ID: POINTER_AND_SIZE,
    ARRAY_ID: np.dtype("<u8"),
    JSON_ID: POINTER_AND_SIZE,
    TENSOR_ID: np.dtype("<u8"),
}
SAMPLE = np.dtype([("image", IMAGE), ("label", RECORDS[INT_ID])], align=True)
ENTRY = np.dtype([("sample", SAMPLE), ("size", "<u8")])  # what a writer must remember of a sample


class BetonWriter:
    """Writes samples of an image and a label, one after the other; equal samples make equal files.

    Used in a `with` block: leaving it normally completes the file and forces it to the disk; leaving it by an
    exception leaves an incomplete file, which `check_beton` and FFCV refuse.

    Args:
        path: the file to make.
        capacity: the largest number of samples that will be in it.
        entries: (N, ENTRY), those of an earlier writer of this file: it is cut back to them and gone on with.
    """

    def __init__(self, path: Path, capacity: int, entries: np.ndarray | None = None) -> None:
        self._entries = np.zeros(capacity, ENTRY)
        self._page_size = SMALLEST_PAGE
        self._position = _round_up(HEADER.itemsize + 2 * FIELD.itemsize + capacity * SAMPLE.itemsize, SMALLEST_PAGE)
        self.num_samples = 0
        if entries is None or not len(entries):
            self._file: BinaryIO = open(path, "wb", buffering=1 << 20)  # noqa: SIM115  closed by __exit__
            return
        self.num_samples = len(entries)
        self._entries[: self.num_samples] = entries
        self._grow_pages(int(entries["size"].max()))
        self._position = int(entries["sample"]["image"]["pointer"][-1] + entries["size"][-1])
        self._file = open(path, "r+b", buffering=1 << 20)  # noqa: SIM115
        self._file.truncate(self._position)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._file:
            if error is None:
                self._finish()

    @property
    def entries(self) -> np.ndarray:
        """What another writer needs to go on from here: (num_samples, ENTRY)."""
        return self._entries[: self.num_samples]

    def append(self, mode: int, height: int, width: int, data: bytes, label: int) -> None:
        """Adds one sample: its bytes (a JPEG, or height x width x 3 raw values), and its label."""
        self._grow_pages(len(data))
        if self._position % self._page_size + len(data) > self._page_size:
            self._position = _round_up(self._position, self._page_size)
        if self._file.tell() != self._position:
            self._file.seek(self._position)
        self._file.write(data)
        self._entries[self.num_samples] = (((mode, width, height, self._position), label), len(data))
        self._position += len(data)
        self.num_samples += 1

    def sync(self) -> None:
        """Forces to the disk what has been appended."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _grow_pages(self, size: int) -> None:
        # Pages may grow while writing: what lies within a small page lies within the larger page around it.
        while size > self._page_size:
            self._page_size *= 2
        if self._page_size > LARGEST_PAGE:
            raise ValueError(f"data holds {size:,} bytes, but a sample may hold at most {LARGEST_PAGE:,}")

    def _finish(self) -> None:
        # Field by field into zeros: a copy of records would leave chance bytes in the gaps between their fields.
        samples, allocations = np.zeros(self.num_samples, SAMPLE), np.zeros(self.num_samples, ALLOCATION)
        samples["image"], samples["label"] = self.entries["sample"]["image"], self.entries["sample"]["label"]
        allocations["sample"] = np.arange(self.num_samples)
        allocations["pointer"] = self.entries["sample"]["image"]["pointer"]
        allocations["size"] = self.entries["size"]
        self._file.seek(self._position)
        self._file.write(allocations.tobytes())
        header = np.array((BETON_VERSION, 2, self._page_size, self.num_samples, self._position), HEADER)
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.write(_field("image", IMAGE_ID) + _field("label", INT_ID))
        self._file.write(samples.tobytes())
        self.sync()


@dataclass(frozen=True)
class BetonSummary:
    """What a .beton holds, read from its metadata: arrays are (N,), in sample order."""

    num_samples: int
    labels: np.ndarray | None  # (N,) int64
    heights: np.ndarray
    widths: np.ndarray
    is_jpeg: np.ndarray
    offsets: np.ndarray  # where an image's bytes begin in the file
    num_bytes: np.ndarray
    page_size: int


def check_beton(path: Path, *, num_classes: int | None, require_labels: bool) -> BetonSummary:
    """Checks that a .beton is complete and fits its use, from header and metadata alone (no image is decoded).

    Args:
        path: the file.
        num_classes: labels must lie in [0, num_classes); None leaves them unchecked.
        require_labels: whether a file without the field `label` is refused.

    Raises:
        UserError: the file is missing, unreadable, truncated, damaged or not a .beton; has no images; has no labels
            though they are required; or has a label outside the classes (the first such sample is named).
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _check(_Reader(path, file), num_classes, require_labels)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; tools/convert_dataset.py makes it") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


class _Reader:
    """Reads arrays from a file and says in a person's words what is wrong with it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, os.fstat(file.fileno()).st_size

    def array(self, dtype: np.dtype, count: int) -> np.ndarray:
        end = self.file.tell() + count * dtype.itemsize
        if end > self.size:
            raise self.truncated(end)
        return np.frombuffer(self.file.read(count * dtype.itemsize), dtype, count)

    def truncated(self, needed: int) -> UserError:
        return UserError(
            f"{self.path} is truncated: it has {self.size:,} bytes and needs at least {needed:,}; convert it again"
        )

    def foreign(self, reason: str) -> UserError:
        return UserError(f"{self.path} is not a .beton file of format {BETON_VERSION}: {reason}")

    def damaged(self, reason: str) -> UserError:
        return UserError(f"{self.path} is damaged: {reason}; convert it again")


def _check(reader: _Reader, num_classes: int | None, require_labels: bool) -> BetonSummary:
    header = _read_header(reader)
    fields = _read_fields(reader, int(header["num_fields"]))
    if fields.get("image") != IMAGE_ID:
        raise UserError(f"{reader.path} has no image field named 'image' (its fields: {', '.join(fields) or 'none'})")
    if require_labels and fields.get("label") != INT_ID:
        without = [name for name, section in OBJECTIVES.items() if not section.needs_labels]
        raise UserError(
            f"{reader.path} has no integer field named 'label' (its fields: {', '.join(fields)}); "
            f"objectives that need none: {', '.join(without)}"
        )
    record = np.dtype([(name, RECORDS[type_id]) for name, type_id in fields.items()], align=True)
    samples = reader.array(record, int(header["num_samples"]))
    sizes = _stored_sizes(reader, samples["image"], int(header["table"]))
    labels = None
    if fields.get("label") == INT_ID:
        labels = samples["label"].astype(np.int64)
        _check_labels(reader, labels, num_classes)
    return BetonSummary(
        num_samples=len(samples),
        labels=labels,
        heights=samples["image"]["height"].copy(),
        widths=samples["image"]["width"].copy(),
        is_jpeg=samples["image"]["mode"] == MODE_JPEG,
        offsets=samples["image"]["pointer"].copy(),
        num_bytes=sizes,
        page_size=int(header["page_size"]),
    )


def _read_header(reader: _Reader) -> np.void:
    if reader.size < HEADER.itemsize:
        raise reader.foreign(f"it has only {reader.size} bytes")
    header = reader.array(HEADER, 1)[0]
    if header["version"] != BETON_VERSION:
        raise reader.foreign(f"its first two bytes say {header['version']}")
    page_size = int(header["page_size"])
    if page_size == 0 or page_size & (page_size - 1) or not 1 <= header["num_fields"] <= 255:
        raise reader.foreign(f"its header tells of {header['num_fields']} fields in pages of {page_size:,} bytes")
    if header["num_samples"] == 0:
        raise UserError(f"{reader.path} holds no samples")
    if header["table"] == 0:
        raise reader.damaged("it was never finished (its header points to no table of allocations)")
    if header["table"] >= reader.size:
        raise reader.truncated(int(header["table"]) + ALLOCATION.itemsize)
    return header


def _read_fields(reader: _Reader, num_fields: int) -> dict[str, int]:
    """The type id of every field, by name, in order."""
    fields = {}
    for descriptor in reader.array(FIELD, num_fields):
        name = descriptor["name"].tobytes().split(b"\0")[0].decode("ascii", "replace")
        if descriptor["type_id"] not in RECORDS:
            raise UserError(f"{reader.path} has a field '{name}' of a custom type, which cannot be read here")
        fields[name] = int(descriptor["type_id"])
    return fields


def _stored_sizes(reader: _Reader, images: np.ndarray, table: int) -> np.ndarray:
    """The number of bytes stored for every image, (N,) uint64, once all of them are known to lie in the file."""
    if images["mode"].max() > MODE_RAW or 0 in (images["height"].min(), images["width"].min()):
        raise reader.damaged("its metadata tells of images of no size or of an unknown storage mode")
    if (reader.size - table) % ALLOCATION.itemsize:
        raise reader.damaged("its table of allocations does not end with the file")
    reader.file.seek(table)
    allocations = reader.array(ALLOCATION, (reader.size - table) // ALLOCATION.itemsize)
    # FFCV's own writer lists the allocations worker by worker.
    allocations = allocations[np.argsort(allocations["pointer"], kind="stable")]
    # Compared without adding pointer and size, whose sum could wrap around in a damaged file.
    room = np.uint64(table) - np.minimum(allocations["pointer"], np.uint64(table))
    if (allocations["size"] > room).any() or not allocations["size"].all():
        raise reader.damaged("its table of allocations points outside the file")
    found = np.searchsorted(allocations["pointer"], images["pointer"])
    known = found < len(allocations)
    known[known] = allocations["pointer"][found[known]] == images["pointer"][known]
    if not known.all():
        raise reader.damaged(f"sample {int(np.argmin(known))}'s bytes are missing from its table of allocations")
    sizes = allocations["size"][found]
    raw_sizes = images["height"].astype(np.uint64) * images["width"] * 3
    fitting = (images["mode"] != MODE_RAW) | (sizes == raw_sizes)
    if not fitting.all():
        raise reader.damaged(f"sample {int(np.argmin(fitting))} is raw, but not height x width x 3 bytes")
    return sizes


def _check_labels(reader: _Reader, labels: np.ndarray, num_classes: int | None) -> None:
    if num_classes is None:
        return
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise UserError(
            f"{sample_title(reader.path, first)} has label {labels[first]}, but the data set has {num_classes} classes "
            f"(labels 0 to {num_classes - 1})"
        )


def _field(name: str, type_id: int) -> bytes:
    descriptor = np.zeros((), FIELD)
    descriptor["type_id"] = type_id
    descriptor["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    return descriptor.tobytes()


def _round_up(position: int, multiple: int) -> int:
    return -(-position // multiple) * multiple
