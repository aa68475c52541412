"""A converted data set on the disk: train.beton, val.beton, their samples' names, and dataset.json about them all."""

import dataclasses
import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from varscale.data.beton import BetonSummary, check_beton
from varscale.errors import UserError

__all__ = [
    "BetonSummary",
    "DatasetInfo",
    "check_beton",
    "check_counts",
    "read_dataset_info",
    "update_digest",
    "write_dataset_info",
]

FORMAT_VERSION = 1
SPLITS = ("train", "val")
INFO_FILE = "dataset.json"


@dataclass(frozen=True)
class DatasetInfo:
    """What dataset.json says.

    Attributes:
        source: the source as it was named to the conversion, such as `digits` or `imagefolder:/data/flowers`.
        classes: the classes' names; a label is an index into them.
        counts: images per class, for "train" and "val".
        image_sizes: for "train" and "val": min_height, max_height, min_width and max_width of the stored images.
        mean, std: of each channel (red, green, blue) over all pixels of train, on the scale [0, 1].
        options: the conversion's options that shape the contents.
        digest: SHA-256 (hex) over the stored samples in order: label, storage mode, height, width, bytes.
        skipped: how many undecodable images were left out.
        format_version: of dataset.json.
    """

    source: str
    classes: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    image_sizes: dict[str, dict[str, int]]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    options: dict[str, int | None]
    digest: str
    skipped: int = 0
    format_version: int = FORMAT_VERSION

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def num_samples(self, split: str) -> int:
        """The number of images in "train" or "val"."""
        return sum(self.counts[split])


def write_dataset_info(directory: Path, info: DatasetInfo) -> None:
    """Writes `info` into the directory as dataset.json."""
    text = json.dumps({"format_version": info.format_version} | dataclasses.asdict(info), indent=1)
    (Path(directory) / INFO_FILE).write_text(text + "\n", encoding="utf-8")


def read_dataset_info(directory: Path) -> DatasetInfo:
    """Reads the directory's dataset.json.

    Raises:
        UserError: there is none, it is not one of ours, or a newer version of varscale wrote it.
    """
    path = Path(directory) / INFO_FILE
    content = _read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("format_version"), int):
        raise UserError(f"{path} is not a description of a data set: it has no format_version")
    if content["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {content['format_version']}, but this varscale reads up to {FORMAT_VERSION}: "
            "update varscale or convert the data set again"
        )
    fields = {field.name for field in dataclasses.fields(DatasetInfo)}
    if fields != content.keys():
        wrong = ", ".join(sorted(fields ^ content.keys()))
        raise UserError(f"{path} is damaged: missing or unknown keys: {wrong}; convert the data set again")
    try:
        return _from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); convert the data set again") from None


def check_counts(beton: Path, summary: BetonSummary, info: DatasetInfo, split: str) -> None:
    """Raises UserError where a split's file holds other numbers of images, or of a class, than dataset.json tells of.

    Images that changed places are not found so: `verify` compares all bytes with the digest.
    """
    if summary.num_samples != info.num_samples(split):
        raise UserError(
            f"{beton}: holds {summary.num_samples} images, but {INFO_FILE} describes {info.num_samples(split)}"
        )
    if summary.labels is None:
        return
    found = np.bincount(summary.labels, minlength=info.num_classes)
    wrong = np.flatnonzero(found != info.counts[split])
    if wrong.size:
        label = int(wrong[0])
        raise UserError(
            f"{beton}: holds {found[label]} images of class '{info.classes[label]}' (label {label}), but {INFO_FILE} "
            f"describes {info.counts[split][label]}: labels were changed; convert the data set again"
        )


def update_digest(digest: "hashlib._Hash", label: int, mode: int, height: int, width: int, data: bytes) -> None:
    """Adds one sample to a data set's digest; each split begins with its name."""
    digest.update(struct.pack("<qBHHQ", label, mode, height, width, len(data)))
    digest.update(data)


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path.parent} holds no converted data set ({path.name} is missing); "
            f"make it with: python tools/convert_dataset.py SOURCE {path.parent}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: not JSON ({error}); convert the data set again") from None


def _from_json(content: dict) -> DatasetInfo:
    """A DatasetInfo with the types that JSON loses; raises ValueError where the parts do not fit each other."""
    classes = tuple(str(name) for name in content["classes"])
    counts = {split: tuple(int(count) for count in content["counts"][split]) for split in SPLITS}
    sizes = ("min_height", "max_height", "min_width", "max_width")
    image_sizes = {split: {size: int(content["image_sizes"][split][size]) for size in sizes} for split in SPLITS}
    mean, std = (tuple(float(value) for value in content[key]) for key in ("mean", "std"))
    if any(len(counts[split]) != len(classes) for split in SPLITS):
        raise ValueError(f"{len(classes)} classes, but counts for {len(counts['train'])} and {len(counts['val'])}")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError("mean and std must have three values each")
    return DatasetInfo(
        **content
        | {"classes": classes, "counts": counts, "image_sizes": image_sizes, "mean": mean, "std": std}
        | {"options": dict(content["options"]), "skipped": int(content["skipped"])}
    )
