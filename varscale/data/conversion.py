"""Converts a source of images into train.beton, val.beton, names and dataset.json: all of it, or nothing."""

import hashlib
import math
import os
import shutil
import signal
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

from varscale.data.beton import ALLOCATION, SAMPLE, SMALLEST_PAGE, BetonWriter, check_beton
from varscale.data.dataset import INFO_FILE, SPLITS, DatasetInfo, names_file, write_dataset_info, write_names
from varscale.data.images import ImageOptions, StoredChunk, StoredImage, encode_chunk
from varscale.data.sources import Source, Split
from varscale.data.staging import check_target, staged_directory
from varscale.errors import UserError

CHUNK = 32  # images a task: small enough to keep few in memory, large enough to hide a task's cost
PROBES = 64  # images a split that are encoded to foresee the size of the result
SKIPPED_FILE = "skipped.txt"
RESULT = {
    "required": ("train.beton", "val.beton", INFO_FILE),
    "optional": (*(names_file(split) for split in SPLITS), SKIPPED_FILE),
}

Encoder = Callable[[Split], Iterator[StoredChunk]]


@dataclass(frozen=True)
class Conversion:
    """What was made.

    Attributes:
        directory: where it lies.
        info: its dataset.json.
        storage: how many images were stored in which way (`varscale.data.images.StoredImage`).
        mended: the images whose JPEG was damaged, but not beyond decoding.
        num_bytes: the size of both .beton files.
    """

    directory: Path
    info: DatasetInfo
    storage: Counter[str]
    mended: list[str]
    num_bytes: int


class UndecodableFiles(UserError):
    """Some images cannot be decoded; `reports` names each with the reason."""

    def __init__(self, spec: str, reports: list[str], num_samples: int) -> None:
        self.reports = reports
        super().__init__(
            f"{spec}: {len(reports):,} of {num_samples:,} images cannot be decoded, nothing was written: "
            "mend or remove them, or leave them out by --skip-bad"
        )


@dataclass
class _Part:
    """What one split's conversion counts on its way; `histogram` is (3, 256) int64."""

    counts: np.ndarray
    histogram: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), np.int64))
    heights: set[int] = field(default_factory=set)
    widths: set[int] = field(default_factory=set)
    storage: Counter[str] = field(default_factory=Counter)
    mended: list[int] = field(default_factory=list)  # positions in the source
    undecodable: dict[int, str] = field(default_factory=dict)  # the reasons by position in the source

    @property
    def image_sizes(self) -> dict[str, int]:
        extremes = {"height": self.heights, "width": self.widths}
        return {f"{end.__name__}_{side}": end(values) for side, values in extremes.items() for end in (min, max)}


def check_directory(directory: Path, *, overwrite: bool) -> None:
    """Raises UserError when `convert` could not put its result there; asked before a source is listed or downloaded."""
    check_target(directory, **RESULT, overwrite=overwrite)


def convert(
    source: Source,
    directory: Path,
    *,
    image_options: ImageOptions | None = None,
    workers: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Conversion:
    """Writes the data set; equal sources and options give equal bytes, whatever the number of workers.

    Args:
        source: the images (`varscale.data.sources.open_source`).
        directory: the folder to make; it may exist empty, or hold a data set if `overwrite`.
        image_options: how images are stored.
        workers: processes that decode and encode; 1 works in this process.
        skip_bad: leave out undecodable images (named in skipped.txt) rather than fail.
        overwrite: replace a data set that the directory holds.
        progress: show a progress bar on stderr.

    Raises:
        UndecodableFiles: after all images were looked at, when some cannot be decoded and `skip_bad` is off.
        UserError: the directory is not free, no permission, disk full, a file unreadable, or a class left empty.
    """
    options = image_options or ImageOptions()
    parts, digest = {}, hashlib.sha256()
    with staged_directory(directory, **RESULT, overwrite=overwrite) as stage:
        _check_space(directory, stage, estimated_bytes(source, options))
        with _chunk_encoder(workers, options) as encode:
            for name in SPLITS:
                parts[name] = _write_split(stage / f"{name}.beton", source, name, encode, digest, progress)
        splits = {name: getattr(source, name) for name in SPLITS}
        undecodable = [
            f"{splits[name].name(index)}: {reason}"
            for name, part in parts.items()
            for index, reason in part.undecodable.items()
        ]
        if undecodable and not skip_bad:
            num_samples = len(source.train.labels) + len(source.val.labels)
            raise UndecodableFiles(source.spec, undecodable, num_samples)
        _check_classes_left(source, parts)
        if undecodable:
            lines = "\n".join(undecodable) + "\n"
            (stage / SKIPPED_FILE).write_text(lines, encoding="utf-8", errors="surrogateescape")
        for name, split in splits.items():
            written = (index for index in range(len(split.labels)) if index not in parts[name].undecodable)
            write_names(stage, name, map(split.name, written))
        info = _describe(source, options, parts, digest.hexdigest())
        write_dataset_info(stage, info)
        betons = [stage / f"{name}.beton" for name in SPLITS]
        for beton in betons:
            check_beton(beton, num_classes=info.num_classes, require_labels=True)
        num_bytes = sum(beton.stat().st_size for beton in betons)
    storage = sum((part.storage for part in parts.values()), Counter())
    mended = [splits[name].name(index) for name, part in parts.items() for index in part.mended]
    return Conversion(directory, info, storage, mended, num_bytes)


def estimated_bytes(source: Source, options: ImageOptions) -> int:
    """About how large the two .beton files will be, from some images of each split, evenly spread."""
    total = 0
    for split in (source.train, source.val):
        num_samples = len(split.labels)
        probed = np.linspace(0, num_samples - 1, min(num_samples, PROBES)).astype(int).tolist()
        images = encode_chunk([split.content(index) for index in probed], options).images
        sizes = [len(image.data) for image in images if isinstance(image, StoredImage)]
        total += SMALLEST_PAGE + num_samples * (SAMPLE.itemsize + ALLOCATION.itemsize)
        total += math.ceil(num_samples * sum(sizes) / max(1, len(sizes)))
    return total


def channel_statistics(histogram: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel on the scale [0, 1], from its histogram (3, 256), in exact integers.

    The deviation is the population's: sqrt(E[x^2] - E[x]^2).
    """
    means, deviations = [], []
    for frequencies in histogram.tolist():
        count = sum(frequencies)
        first = sum(value * frequency for value, frequency in enumerate(frequencies))
        second = sum(value * value * frequency for value, frequency in enumerate(frequencies))
        means.append(first / (255 * count))
        deviations.append(math.sqrt((count * second - first * first) / (255 * count) ** 2))
    return tuple(means), tuple(deviations)


def _check_space(directory: Path, stage: Path, needed: int) -> None:
    free = shutil.disk_usage(stage).free
    if needed > free:
        raise UserError(
            f"{directory}: not enough disk space: about {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free "
            "(--max-resolution and --jpeg-quality make the result smaller)"
        )


def _write_split(
    path: Path, source: Source, name: str, encode: Encoder, digest: "hashlib._Hash", progress: bool
) -> _Part:
    split: Split = getattr(source, name)
    part = _Part(np.zeros(len(source.classes), np.int64))
    digest.update(name.encode())
    bar = tqdm(total=len(split.labels), desc=name, unit=" images", disable=not progress, mininterval=0.5)
    with bar, BetonWriter(path, len(split.labels)) as writer:
        index = 0
        for chunk in encode(split):
            for image in chunk.images:
                if isinstance(image, StoredImage):
                    _write_image(writer, part, digest, image, int(split.labels[index]))
                    part.mended += [index] * (image.storage == "mended")
                else:
                    part.undecodable[index] = image
                index += 1
            part.histogram += chunk.histogram
            bar.update(len(chunk.images))
    return part


def _write_image(writer: BetonWriter, part: _Part, digest: "hashlib._Hash", image: StoredImage, label: int) -> None:
    writer.append(image.mode, image.height, image.width, image.data, label)
    digest.update(struct.pack("<qBHHQ", label, image.mode, image.height, image.width, len(image.data)))
    digest.update(image.data)
    part.counts[label] += 1
    part.heights.add(image.height)
    part.widths.add(image.width)
    part.storage[image.storage] += 1


def _check_classes_left(source: Source, parts: dict[str, _Part]) -> None:
    for name, part in parts.items():
        if not part.counts.all():
            empty = source.classes[int(np.argmin(part.counts))]
            raise UserError(f"{source.spec}: none of the images of class '{empty}' in {name} can be decoded")


def _describe(source: Source, options: ImageOptions, parts: dict[str, _Part], digest: str) -> DatasetInfo:
    mean, std = channel_statistics(parts["train"].histogram)
    return DatasetInfo(
        source=source.spec,
        classes=source.classes,
        counts={name: tuple(part.counts.tolist()) for name, part in parts.items()},
        image_sizes={name: part.image_sizes for name, part in parts.items()},
        mean=mean,
        std=std,
        options=source.options | asdict(options),
        digest=digest,
        skipped=sum(len(part.undecodable) for part in parts.values()),
    )


@contextmanager
def _chunk_encoder(workers: int, options: ImageOptions) -> Iterator[Encoder]:
    """Yields a function that encodes a split in order, in so many processes."""
    if workers == 1:
        yield lambda split: (encode_chunk(contents, options) for contents in _chunks(split))
        return
    # Spawned, not forked: a fork of a process with threads (numba's, torch's) may hang.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        yield lambda split: _encode_in_order(pool, split, options, ahead=2 * workers)
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for want of memory: try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_in_order(
    pool: ProcessPoolExecutor, split: Split, options: ImageOptions, ahead: int
) -> Iterator[StoredChunk]:
    """Results in the order of the tasks, of which at most `ahead` wait, so that memory stays bounded."""
    running = deque()
    for contents in _chunks(split):
        running.append(pool.submit(encode_chunk, contents, options))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _chunks(split: Split) -> Iterator[list[str | np.ndarray]]:
    num_samples = len(split.labels)
    for start in range(0, num_samples, CHUNK):
        yield [split.content(index) for index in range(start, min(start + CHUNK, num_samples))]


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent process, and ends with it should it be killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)
