"""The labelled images that bench_train.py trains on: converted for varscale, as files or one array for the others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from loader_contenders import Images
from loader_images import contents_of

from varscale.data.beton import check_beton
from varscale.data.conversion import convert
from varscale.data.dataset import read_dataset_info
from varscale.data.images import Content, FilePart
from varscale.data.sources import Source
from varscale.errors import UserError

MADE = ("synthetic", "cifar")  # JPEGs of ImageNet's size, and 32x32 arrays, both of noise


@dataclass(frozen=True)
class Repeated:
    """A split of `count` images: those of `contents`, one after the other, over and over."""

    contents: Sequence[Content]
    own_labels: np.ndarray
    count: int

    @property
    def labels(self) -> np.ndarray:
        return np.resize(self.own_labels, self.count)

    def content(self, index: int) -> Content:
        return self.contents[index % len(self.contents)]

    def name(self, index: int) -> str:
        return f"image {index}"

    def identity(self) -> Iterator[bytes]:
        yield self.labels.tobytes()


def write_training_images(name: str, count: int, classes: int, folder: Path, workers: int) -> tuple[str, int]:
    """Writes `count` images into the folder; returns a description of them and the number of their classes.

    folder/converted becomes a data set for varscale, the folder itself what `Images` describes, with labels.npy,
    (files,) int64: the different images only, which the others repeat likewise.

    Args:
        name: one of `MADE`, or a folder made by tools/convert_dataset.py, of which `count` images are taken, evenly
            spread.
        classes: of images that are made here.
        workers: processes that convert.

    Raises:
        UserError: there is no such data set, it has fewer than two classes with labels, or it mixes JPEGs and arrays.
    """
    if name in MADE:
        contents = contents_of(name, count, folder)
        labels = np.arange(len(contents), dtype=np.int64) % classes
    else:
        contents, labels = _contents_of_dataset(Path(name), count)
    labels = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    one_of_each = np.unique(labels, return_index=True)[1]
    if len(one_of_each) < 2:
        raise UserError(f"{name}: {len(contents)} images hold only one class; at least two are needed")
    source = Source(
        spec=name,
        classes=tuple(map(str, range(len(one_of_each)))),
        train=Repeated(contents, labels, count),
        val=Repeated([contents[index] for index in one_of_each], labels[one_of_each], len(one_of_each)),
    )
    convert(source, folder / "converted", workers=workers)
    images = Images(folder)
    np.save(folder / "labels.npy", labels)
    if isinstance(contents[0], np.ndarray):
        np.save(images.array, np.stack(contents))
    else:
        for index, content in enumerate(contents):
            Path(images.jpeg(index)).write_bytes(_file_bytes(content))
    sides = read_dataset_info(folder / "converted").image_sizes["train"]
    form = "raw" if isinstance(contents[0], np.ndarray) else "JPEG"
    return (
        f"{count:,} {form} images ({len(contents):,} different, up to {sides['max_width']} x {sides['max_height']}), "
        f"{len(one_of_each)} classes",
        len(one_of_each),
    )


def _contents_of_dataset(directory: Path, count: int) -> tuple[Sequence[Content], np.ndarray]:
    """At most `count` training images of a converted data set, and their labels."""
    read_dataset_info(directory)
    beton = directory / "train.beton"
    summary = check_beton(beton, num_classes=None, require_labels=True)
    chosen = np.linspace(0, summary.num_samples - 1, min(count, summary.num_samples)).astype(np.int64)
    kinds = np.unique(summary.is_jpeg[chosen])
    if len(kinds) > 1:
        raise UserError(f"{beton} holds both JPEGs and raw images; the benchmark takes one kind at a time")
    parts = [FilePart(str(beton), int(summary.offsets[index]), int(summary.num_bytes[index])) for index in chosen]
    if kinds[0]:
        return parts, summary.labels[chosen]
    shapes = np.stack([summary.heights[chosen], summary.widths[chosen]], 1)
    if len(np.unique(shapes, axis=0)) > 1:
        raise UserError(f"{beton} holds raw images of several sizes; the benchmark takes raw images of one size")
    pixels = [np.frombuffer(_file_bytes(part), np.uint8).reshape(*shapes[0], 3) for part in parts]
    return pixels, summary.labels[chosen]


def _file_bytes(content: str | FilePart) -> bytes:
    if isinstance(content, str):
        return Path(content).read_bytes()
    with open(content.path, "rb") as file:
        file.seek(content.offset)
        return file.read(content.size)
