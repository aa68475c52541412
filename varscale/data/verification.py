"""Reads a converted data set again, decodes every image as the loader does, and compares it with dataset.json."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from varscale.data.beton import MODE_JPEG, MODE_RAW, BetonSummary, check_beton
from varscale.data.dataset import (
    SPLITS,
    DatasetInfo,
    read_dataset_info,
    update_digest,
)
from varscale.data.decoders import decode_views_by, installed_decoder
from varscale.data.geometry import VIEW
from varscale.data.names import names_file, sample_title
from varscale.data.records import DECODED, FAILURES, record_table, scratch_bytes
from varscale.data.throughput import Throughput

CHUNK = 64  # images a task
NO_VIEWS, NO_IMAGES = np.zeros(0, VIEW), np.zeros(0, np.uint8)  # the decoder decodes, and cuts nothing


@dataclass(frozen=True)
class Verification:
    """What was read, and a line for everything that is not as it was written."""

    info: DatasetInfo
    throughput: Throughput
    damage: list[str]


def verify(directory: Path, *, workers: int = 1, progress: bool = False) -> Verification:
    """Compares a data set with its dataset.json: classes, labels, names, digest; and decodes every image.

    Args:
        directory: the data set.
        workers: threads that decode.
        progress: show a progress bar on stderr.

    Raises:
        UserError: the directory holds no data set, or a file of it is missing, truncated or not a .beton.
    """
    info = read_dataset_info(directory)
    throughput = Throughput("read", progress=progress)
    digest, damage = hashlib.sha256(), []
    for split in SPLITS:
        path = Path(directory) / f"{split}.beton"
        summary = check_beton(path, num_classes=info.num_classes, require_labels=True)
        damage += _wrong_counts(directory, info, split, summary)
        digest.update(split.encode())
        with throughput.bar(f"verifying {split}", summary.num_samples):
            for index, reason in _decode(path, summary, digest, workers, throughput):
                damage.append(f"{sample_title(path, index)}: {reason}")
    if digest.hexdigest() != info.digest:
        damage.append(f"{directory}: the images and labels are not those that were converted: their digest differs")
    return Verification(info, throughput, damage)


def _wrong_counts(directory: Path, info: DatasetInfo, split: str, summary: BetonSummary) -> Iterator[str]:
    counts = np.bincount(summary.labels, minlength=info.num_classes)
    for name, found, expected in zip(info.classes, counts.tolist(), info.counts[split], strict=True):
        if found != expected:
            yield f"{directory}: {split} has {found:,} images of class '{name}', but dataset.json says {expected:,}"
    names = Path(directory) / names_file(split)
    if names.exists():
        with open(names, "rb") as file:
            lines = sum(1 for _ in file)
        if lines != summary.num_samples:
            yield f"{names} holds {lines:,} names, but {split}.beton {summary.num_samples:,} samples"


def _decode(
    path: Path, summary: BetonSummary, digest: "hashlib._Hash", workers: int, throughput: Throughput
) -> Iterator[tuple[int, str]]:
    """Yields every sample that cannot be decoded, with the reason; the digest takes them all."""
    records = record_table(summary)
    with open(path, "rb") as file, ThreadPoolExecutor(workers) as pool:
        running = deque()
        for indices in np.split(np.arange(len(records)), range(CHUNK, len(records), CHUNK)):
            running.append(pool.submit(_undecodable, file.fileno(), records, indices))
            throughput.count(len(indices), _digest_samples(file.fileno(), summary, indices, digest))
            if len(running) > 2 * workers:
                yield from running.popleft().result()
        for chunk in running:
            yield from chunk.result()


def _undecodable(file: int, records: np.ndarray, indices: np.ndarray) -> list[tuple[int, str]]:
    decode_views = decode_views_by(installed_decoder())
    found, scratch, zero = [], np.empty(scratch_bytes(records[indices]).max(), np.uint8), np.uint64(0)
    while len(indices):
        position, status = decode_views(
            file, records, indices, 0, len(indices), NO_VIEWS, zero, zero, scratch, NO_IMAGES
        )
        if status == DECODED:
            break
        found.append((int(indices[position]), FAILURES[status]))
        indices = indices[position + 1 :]
    return found


def _digest_samples(file: int, summary: BetonSummary, indices: np.ndarray, digest: "hashlib._Hash") -> int:
    """Adds samples to the digest; returns the number of their bytes."""
    columns = (summary.labels, summary.is_jpeg, summary.heights, summary.widths, summary.offsets, summary.num_bytes)
    for label, is_jpeg, height, width, offset, size in zip(*(c[indices].tolist() for c in columns), strict=True):
        mode = MODE_JPEG if is_jpeg else MODE_RAW
        update_digest(digest, label, mode, height, width, os.pread(file, size, offset))
    return int(summary.num_bytes[indices].sum())
