"""Batches of views from a .beton: FFCV's format and decoder, run by a few threads that end with the iteration.

`ffcv.loader.Loader` itself is not used. Its thread swallows exceptions, so that the consumer waits for ever; its
buffers are reused, so that batches change under the consumer; its threads outlive an early stop; it sets torch's number
of threads; its memory maps end the process where a file was cut short, and its page cache holds the whole file when the
order is truly random. What it stands on is used: the format and the compiled imdecode.

A batch is cut into chunks, and worker threads decode them outside Python's lock. The chunks' futures carry an exception
to the consumer. Memory: `batches_ahead` batches of views besides those that the consumer holds, and for every worker
the largest image and the largest record of its chunk.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch

from varscale.data.beton import BetonSummary, check_beton
from varscale.data.decoding import DECODED, FAILURES, RECORD, CropSpec, decode_views, view_table
from varscale.data.randomness import as_uint64

CHUNKS_PER_WORKER = 4  # small enough that workers finish a batch together, large enough that Python does not show


class LoaderError(RuntimeError):
    """A sample could not be loaded: the message names the file, the sample's index and the reason."""


class Batch(NamedTuple):
    """Views of N samples, the consumer's own: nothing is written to them again.

    images: (N, V, H, W, 3) uint8 on the CPU, pinned where CUDA is there.
    labels: (N,) int64, -1 where the file has none. indices: (N,) int64, the samples' numbers in the file.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor


class ViewLoader:
    """Decodes each sample of a .beton once and cuts V views from it.

    The views are a pure function of the file and (seed, epoch, sample, view): neither workers nor batches change them.

    Args:
        beton: the file.
        crops: one for each view; all of one size.
        seed: of the crops and flips.
        workers: threads that decode.
        batches_ahead: how many batches are decoded before they are asked for.
        os_cache: leave the file to the operating system's cache, which serves the next epoch. False is for files larger
            than memory: the records of coming batches are read ahead and dropped from the cache once decoded.

    Raises:
        UserError: the file is missing, truncated or not a .beton with images.
        ValueError: no crops, crops of several sizes, or numbers below 1.
    """

    def __init__(
        self,
        beton: Path,
        crops: Sequence[CropSpec],
        *,
        seed: int,
        workers: int,
        batches_ahead: int = 3,
        os_cache: bool = True,
    ) -> None:
        sizes = {crop.size for crop in crops}
        if len(sizes) != 1:
            raise ValueError(f"crops must be at least one and all of one size, got sizes {sorted(sizes)}")
        if workers < 1 or batches_ahead < 1:
            raise ValueError(f"workers and batches_ahead must be at least 1, got {workers} and {batches_ahead}")
        self.beton, self.workers, self.batches_ahead, self.os_cache = Path(beton), workers, batches_ahead, os_cache
        summary = check_beton(self.beton, num_classes=None, require_labels=False)
        self.identity = _identity(os.stat(self.beton))
        self.records = _records(summary)
        self.labels = np.full(summary.num_samples, -1, np.int64) if summary.labels is None else summary.labels
        self.views = view_table(crops)
        self.seed = as_uint64(seed)[0]
        self.view_size = sizes.pop()
        self.pinned = torch.cuda.is_available()
        self._compile()

    @property
    def num_samples(self) -> int:
        return len(self.records)

    def batches(self, indices: np.ndarray, epoch: int) -> "ViewBatches":
        """Loads the samples of `indices`, batch by batch; decoding starts at once.

        Args:
            indices: (batches, n) int64 samples; -1 is padding and dropped, so that a batch may be smaller, or empty.
            epoch: of the crops and flips.

        Returns an iterator of Batch, also a context manager; closing it, or reaching its end, ends its threads.

        Raises:
            ValueError: `indices` is not a table of samples of this file.
            LoaderError: the file changed after the loader was made; while iterating, also: a sample cannot be loaded.
        """
        indices = np.asarray(indices)
        if indices.ndim != 2 or not np.issubdtype(indices.dtype, np.integer):
            raise ValueError(f"indices must be (batches, n) integers, got shape {indices.shape} of {indices.dtype}")
        if indices.size and not -1 <= indices.min() <= indices.max() < self.num_samples:
            raise ValueError(
                f"indices must lie in [0, {self.num_samples}), or be -1 for padding; "
                f"got values from {indices.min()} to {indices.max()}"
            )
        return ViewBatches(self, indices.astype(np.int64), as_uint64(epoch)[0])

    def _compile(self) -> None:
        """Compiles before any thread starts, on no sample."""
        nothing = self._empty_images(0)
        decode_views(-1, self.records, np.empty(0, np.int64), self.views, self.seed, self.seed, nothing.numpy())

    def _decode(self, file: int, epoch: np.uint64, indices: np.ndarray, images: np.ndarray) -> None:
        """Fills `images` (n, V, H, W, 3) with the views of `indices`, in a worker thread."""
        position, status = decode_views(file, self.records, indices, self.views, self.seed, epoch, images)
        if status != DECODED:
            raise LoaderError(f"{self.beton}: sample {indices[position]} cannot be loaded: {FAILURES[status]}")
        if not self.os_cache:
            self._advise(file, indices, os.POSIX_FADV_DONTNEED)

    def _advise(self, file: int, indices: np.ndarray, advice: int) -> None:
        for record in self.records[indices]:
            os.posix_fadvise(file, int(record["offset"]), int(record["size"]), advice)

    def _empty_images(self, count: int) -> torch.Tensor:
        shape = (count, len(self.views), self.view_size, self.view_size, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.pinned)


class ViewBatches:
    """One pass over batches of views: an iterator to be closed. Made by ViewLoader.batches."""

    def __init__(self, loader: ViewLoader, indices: np.ndarray, epoch: np.uint64) -> None:
        self._loader, self._epoch = loader, epoch
        self._coming = iter(indices)
        self._pending: deque[tuple[Batch, list[Future]]] = deque()
        try:
            self._file = os.open(loader.beton, os.O_RDONLY)
        except OSError as error:
            raise LoaderError(f"{loader.beton} cannot be opened any more: {error.strerror}") from error
        self._executor = ThreadPoolExecutor(loader.workers, thread_name_prefix="view-loader")
        self._closed = False
        try:
            self._check_unchanged()
            if not loader.os_cache:
                # Or the system would read on behind every record.
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
            for _ in range(loader.batches_ahead):
                self._schedule()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._pending:
            self.close()
            raise StopIteration
        try:
            batch, chunks = self._pending.popleft()
            for chunk in chunks:
                chunk.result()
            self._check_unchanged()
            self._schedule()
        except BaseException:
            self.close()
            raise
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def close(self) -> None:
        """Drops what is not decoded yet and waits for the chunks in hand: no thread and no open file is left."""
        if self._closed:
            return
        self._closed = True
        self._pending.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)
        os.close(self._file)

    def _check_unchanged(self) -> None:
        if _identity(os.fstat(self._file)) != self._loader.identity:
            raise LoaderError(f"{self._loader.beton} was changed after it had been opened for loading")

    def _schedule(self) -> None:
        """Hands the next batch, if any, to the workers."""
        indices = next(self._coming, None)
        if indices is None:
            return
        loader = self._loader
        indices = indices[indices >= 0]
        images = loader._empty_images(len(indices))
        batch = Batch(images, torch.from_numpy(loader.labels[indices]), torch.from_numpy(indices))
        if not loader.os_cache:
            loader._advise(self._file, indices, os.POSIX_FADV_WILLNEED)
        chunk = max(1, -(-len(indices) // (loader.workers * CHUNKS_PER_WORKER)))
        pixels = images.numpy()
        # The workers hold no reference to this iterator, so that dropping it closes it, and in the consumer's thread.
        decode = partial(loader._decode, self._file, self._epoch)
        chunks = [
            self._executor.submit(decode, indices[start : start + chunk], pixels[start : start + chunk])
            for start in range(0, len(indices), chunk)
        ]
        self._pending.append((batch, chunks))


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """What changes when a file is written to or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _records(summary: BetonSummary) -> np.ndarray:
    """Where every image lies: (N,) RECORD."""
    records = np.zeros(summary.num_samples, RECORD)
    records["offset"], records["size"] = summary.offsets, summary.num_bytes
    records["height"], records["width"] = summary.heights, summary.widths
    records["is_jpeg"] = summary.is_jpeg
    return records
