"""One pass of a loader over batches of views: what is under way, and its clean end."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch

from varscale.data.buffers import Buffers

if TYPE_CHECKING:
    from varscale.data.loader import ViewLoader

CHUNKS_PER_WORKER = 4  # small enough that workers finish a batch together, large enough that Python does not show


class LoaderError(RuntimeError):
    """A sample could not be loaded: the message names the file, the sample's index and the reason."""


class Batch(NamedTuple):
    """Views of N samples, the consumer's own: nothing is written to them again.

    images: for each size of views one (N, V, size, size, 3) uint8 on the CPU, pinned where CUDA is there.
    labels: (N,) int64, -1 where the file has none. indices: (N,) int64, the samples' numbers in the file.
    skipped: how many samples were bad, so that others stand in their places.
    """

    images: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    indices: torch.Tensor
    skipped: int


class ViewBatches:
    """One pass over batches of views: an iterator to be closed. Made by ViewLoader.batches."""

    def __init__(self, loader: "ViewLoader", indices: np.ndarray, epoch: np.uint64) -> None:
        self._loader, self._epoch = loader, epoch
        self._coming = iter(indices)
        self._buffers = Buffers(indices.shape[1] * loader.bytes_per_sample, kept=loader.batches_ahead + 1)
        self._pending: deque[tuple[np.ndarray, torch.Tensor, list[Future]]] = deque()
        try:
            self._file = os.open(loader.beton, os.O_RDONLY)
        except OSError as error:
            raise LoaderError(f"{loader.beton} cannot be opened any more: {error.strerror}") from error
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
            indices, images, chunks = self._pending[0]
            skipped = sum(chunk.result() for chunk in chunks)
            self._pending.popleft()
            self._check_unchanged()
            self._schedule()
        except BaseException:
            self.close()
            raise
        labels = torch.from_numpy(self._loader.labels[indices])
        return Batch(self._loader.by_size(images, len(indices)), labels, torch.from_numpy(indices), skipped)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def close(self) -> None:
        """Drops what is not decoded yet and waits for the chunks in hand: no thread is at work, no file is open."""
        if self._closed:
            return
        self._closed = True
        chunks = [chunk for _, _, chunks in self._pending for chunk in chunks]
        self._pending.clear()
        try:
            wait([chunk for chunk in chunks if not chunk.cancel()])
        finally:
            self._loader.forget_scratch()
            os.close(self._file)

    def _check_unchanged(self) -> None:
        if identity(os.fstat(self._file)) != self._loader.identity:
            raise LoaderError(f"{self._loader.beton} was changed after it had been opened for loading")

    def _schedule(self) -> None:
        """Hands the next batch, if any, to the workers."""
        indices = next(self._coming, None)
        if indices is None:
            return
        loader = self._loader
        indices = indices[indices >= 0]
        size = len(indices) * loader.bytes_per_sample
        # torch uses pinned memory again by itself.
        images = torch.empty(size, dtype=torch.uint8, pin_memory=True) if loader.pinned else self._buffers.take(size)
        if not loader.os_cache:
            loader.advise(self._file, indices, os.POSIX_FADV_WILLNEED)
        chunk = max(1, -(-len(indices) // (loader.workers * CHUNKS_PER_WORKER)))
        # The workers hold no reference to this iterator, so that dropping it closes it, and in the consumer's thread.
        decode = partial(loader.decode, self._file, self._epoch, indices, images.numpy())
        chunks = [
            loader.executor.submit(decode, slice(start, min(start + chunk, len(indices))))
            for start in range(0, len(indices), chunk)
        ]
        self._pending.append((indices, images, chunks))


def identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """What changes when a file is written to or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
