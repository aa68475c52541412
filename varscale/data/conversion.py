"""Converts a source of images into train.beton, val.beton, names and dataset.json: all of it, or nothing.

An interrupted conversion leaves its work beside the directory, and the same conversion, started again, goes on with it:
after Ctrl-C, an error or a full disk behind the last image written; after a kill or a power cut, which leave no time to
write an account, behind the last account, which is some seconds old at most (`varscale.data.journal.INTERVAL`).
"""

import hashlib
import math
import shutil
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from varscale.data.beton import ALLOCATION, SAMPLE, SMALLEST_PAGE, BetonSummary, BetonWriter, check_beton
from varscale.data.dataset import (
    INFO_FILE,
    SPLITS,
    DatasetInfo,
    update_digest,
    write_dataset_info,
)
from varscale.data.encoding import Encoder, chunk_encoder
from varscale.data.images import ImageOptions, StoredImage, encode_chunk
from varscale.data.journal import Journal, Progress, UnusableWork, fingerprint
from varscale.data.names import names_file, write_names
from varscale.data.sources import Source
from varscale.data.staging import check_target, staged_directory
from varscale.data.throughput import Throughput
from varscale.errors import UserError

PROBES = 64  # images a split that are encoded to foresee the size of the result
SKIPPED_FILE = "skipped.txt"
RESULT = {
    "required": ("train.beton", "val.beton", INFO_FILE),
    "optional": (*(names_file(split) for split in SPLITS), SKIPPED_FILE),
}


@dataclass(frozen=True)
class Conversion:
    """What was made.

    Attributes:
        directory: where it lies.
        info: its dataset.json.
        storage: how many images were stored in which way (`varscale.data.images.StoredImage`).
        mended: the images whose JPEG was damaged, but not beyond decoding.
        num_bytes: the size of both .beton files.
        throughput: of what was not kept from before.
    """

    directory: Path
    info: DatasetInfo
    storage: Counter[str]
    mended: list[str]
    num_bytes: int
    throughput: Throughput


class UndecodableFiles(UserError):
    """Some images cannot be decoded; `reports` names each with the reason."""

    def __init__(self, spec: str, reports: list[str], num_images: int) -> None:
        self.reports = reports
        super().__init__(
            f"{spec}: {len(reports):,} of {num_images:,} images cannot be decoded: "
            "mend or remove them, or leave them out by --skip-bad"
        )


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
    fresh: bool = False,
    progress: bool = False,
) -> Conversion:
    """Writes the data set; equal sources and options give equal bytes, whatever the workers and interruptions.

    Args:
        source: the images (`varscale.data.sources.open_source`).
        directory: the folder to make; it may exist empty, or hold a data set if `overwrite`.
        image_options: how images are stored.
        workers: processes that decode and encode; 1 works in this process.
        skip_bad: leave out undecodable images (named in skipped.txt) rather than fail.
        overwrite: replace a data set that the directory holds.
        fresh: drop what an interrupted conversion has kept, rather than go on with it.
        progress: show notes and a progress bar on stderr.

    Raises:
        UndecodableFiles: after all images were looked at, when some cannot be decoded and `skip_bad` is off.
        UserError: the directory is not free, no permission, disk full, a file unreadable, or a class left empty.

    Where work is kept, whatever is raised carries a note that says so.
    """
    options = image_options or ImageOptions()
    num_images = sum(len(source.split(name).labels) for name in SPLITS)
    journal = None
    try:
        with staged_directory(directory, **RESULT, overwrite=overwrite) as stage:
            journal = Journal(stage, fingerprint(source, options))
            if fresh:
                stage.clear()
            digest = _take_up(journal, source, options, progress)
            if not journal.done:
                _check_space(directory, estimated_bytes(source, options))
            elif progress:
                print(f"note: going on after {journal.done:,} of {num_images:,} images", file=sys.stderr)
            throughput = Throughput("written", progress=progress)
            with chunk_encoder(workers, options) as encode:
                for name in SPLITS:
                    _write_split(journal, source, name, encode, digest, throughput)
            parts = journal.progress
            skipped = [
                f"{source.split(name).name(index)}: {reason}"
                for name in SPLITS
                for index, reason in parts[name].undecodable.items()
            ]
            if skipped and not skip_bad:
                raise UndecodableFiles(source.spec, skipped, num_images)
            info = _complete(stage.result, source, options, parts, digest.hexdigest(), skipped)
            num_bytes = sum((stage.result / f"{name}.beton").stat().st_size for name in SPLITS)
    except BaseException as error:
        if journal is not None and journal.done:
            error.add_note(
                f"{journal.done:,} of {num_images:,} images are kept in {journal.stage.folder}; "
                "the same command goes on with them, --fresh starts over"
            )
        raise
    storage = sum((part.storage for part in parts.values()), Counter())
    mended = [source.split(name).name(index) for name in SPLITS for index in parts[name].mended]
    return Conversion(directory, info, storage, mended, num_bytes, throughput)


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


def _take_up(journal: Journal, source: Source, options: ImageOptions, progress: bool) -> "hashlib._Hash":
    """Reads the journal of an interrupted conversion, or begins one; returns the digest over the samples kept."""
    try:
        journal.read()
        digest = journal.digest(progress=progress)
        for name, part in journal.progress.items():
            contents = [source.split(name).content(index) for index in part.undecodable]
            if encode_chunk(contents, options).images != list(part.undecodable.values()):
                raise UnusableWork("images that could not be decoded have changed since")
    except UnusableWork as reason:
        if progress:
            print(f"note: starting over, for {journal.stage.folder} is of no use: {reason}", file=sys.stderr)
        journal.progress = {}
    if journal.progress:
        return digest
    journal.stage.clear()
    return hashlib.sha256()


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory.resolve().parent).free
    if needed > free:
        raise UserError(
            f"{directory}: not enough disk space: about {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free "
            "(--max-resolution and --jpeg-quality make the result smaller)"
        )


def _write_split(
    journal: Journal, source: Source, name: str, encode: Encoder, digest: "hashlib._Hash", throughput: Throughput
) -> None:
    """Writes the samples of a split that the journal does not hold yet."""
    split, part = source.split(name), journal.progress.get(name)
    if part is None:
        digest.update(name.encode())
        part = Progress(digest=digest.hexdigest())
    path, num_images = journal.stage.result / f"{name}.beton", len(split.labels)
    bar = throughput.bar(name, num_images, part.done)
    with bar, BetonWriter(path, num_images, journal.entries(name)) as writer:
        try:
            for chunk in encode(split, part.done):
                labels = split.labels[part.done : part.done + len(chunk.images)].tolist()
                for image, label in zip(chunk.images, labels, strict=True):
                    if isinstance(image, StoredImage):
                        writer.append(image.mode, image.height, image.width, image.data, label)
                        update_digest(digest, label, image.mode, image.height, image.width, image.data)
                part = part.after(chunk, digest.hexdigest())
                if journal.is_due:
                    journal.write(name, part, writer)
                throughput.count(len(chunk.images), chunk.num_bytes)
        finally:
            if part.done:
                journal.write(name, part, writer)


def _complete(
    result: Path, source: Source, options: ImageOptions, parts: dict[str, Progress], digest: str, skipped: list[str]
) -> DatasetInfo:
    """Writes what belongs beside the .betons, and checks these once more."""
    counts, sizes = {}, {}
    for name, part in parts.items():
        split = source.split(name)
        left_out = part.undecodable.keys()
        counts[name] = np.bincount(np.delete(split.labels, list(left_out)), minlength=len(source.classes))
        if not counts[name].all():
            empty = source.classes[int(np.argmin(counts[name]))]
            raise UserError(f"{source.spec}: none of the images of class '{empty}' in {name} can be decoded")
        path = result / f"{name}.beton"
        sizes[name] = _image_sizes(check_beton(path, num_classes=len(source.classes), require_labels=True))
        write_names(result, name, (split.name(index) for index in range(len(split.labels)) if index not in left_out))
    if skipped:
        lines = "\n".join(skipped) + "\n"
        (result / SKIPPED_FILE).write_text(lines, encoding="utf-8", errors="surrogateescape")
    mean, std = channel_statistics(parts["train"].histogram)
    info = DatasetInfo(
        source=source.spec,
        classes=source.classes,
        counts={name: tuple(count.tolist()) for name, count in counts.items()},
        image_sizes=sizes,
        mean=mean,
        std=std,
        options=source.options | asdict(options),
        digest=digest,
        skipped=len(skipped),
    )
    write_dataset_info(result, info)
    return info


def _image_sizes(summary: BetonSummary) -> dict[str, int]:
    sides = {"height": summary.heights, "width": summary.widths}
    return {f"{end.__name__}_{side}": int(end(values)) for side, values in sides.items() for end in (min, max)}
