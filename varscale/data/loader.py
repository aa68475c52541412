"""Batches of views from a .beton: FFCV's format and decoder, run by a few threads of the loader's own.

`ffcv.loader.Loader` itself is not used. Its thread swallows exceptions, so that the consumer waits for ever; its
buffers are reused, so that batches change under the consumer; its threads outlive an early stop; it sets torch's number
of threads; its memory maps end the process where a file was cut short, and its page cache holds the whole file when the
order is truly random. What it stands on is used: the format and the compiled imdecode.

A batch is cut into chunks, and worker threads decode them outside Python's lock. The chunks' futures carry an exception
to the consumer. The threads are kept from one pass to the next: FFCV's decoder never frees what it takes for a thread,
10 KB, when the thread ends.
"""

import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

import numpy as np
import torch

from varscale.data.beton import check_beton
from varscale.data.buffers import Buffers
from varscale.data.decoders import Decoder, decode_views_by
from varscale.data.geometry import CropSpec, view_table, views_by_size
from varscale.data.memory import can_be_cached, check_cached
from varscale.data.names import sample_title
from varscale.data.randomness import as_uint64
from varscale.data.records import DAMAGED, DECODED, FAILURES, OTHER_SIZE, RECORD, record_table, scratch_bytes

CHUNKS_PER_WORKER = 4  # small enough that workers finish a batch together, large enough that Python does not show
BYTES_PER_SAMPLE = RECORD.itemsize + 8 + 8  # its label, and the memory it takes
MOST_SKIPPED_IN_A_ROW = 100  # more bad samples next to each other are no accident


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


class ViewLoader:
    """Decodes each sample of a .beton once and cuts V views from it.

    The views are a pure function of the file, `crops` and (seed, epoch, sample, view): neither workers nor batches
    change them. Where a view lies in its image no other crop changes, but all decide together how far an image is
    shrunk while it is decoded: small views of small parts may keep whole what large ones alone would have shrunk, and
    so change the large ones' pixels, by less than 2.5 levels on average.
    A context manager: `close`, or dropping the loader, ends its threads.

    Memory: see `memory_needed`.

    Args:
        beton: the file.
        crops: one for each view; those of one size stand together.
        seed: of the crops and flips.
        workers: threads that decode.
        batches_ahead: how many batches are decoded before they are asked for.
        os_cache: leave the file to the operating system's cache, which serves the next epoch. False is for files larger
            than memory: the records of coming batches are read ahead and dropped from the cache once decoded. By
            default the memory that is free now decides.
        on_bad_sample: "stop" raises; "skip" lets the next sound sample of the file take a damaged one's place.
        decoder: "ffcv", or "torch" (`varscale.data.torch_decoding`), which is slower and needs no FFCV.

    Raises:
        UserError: the file is missing, truncated or not a .beton with images; it does not fit into the memory that
            os_cache=True wants; FFCV is not installed.
        ValueError: no crops, crops of one size apart from each other, or numbers below 1.
    """

    def __init__(
        self,
        beton: Path,
        crops: Sequence[CropSpec],
        *,
        seed: int,
        workers: int,
        batches_ahead: int = 3,
        os_cache: bool | None = None,
        on_bad_sample: Literal["stop", "skip"] = "stop",
        decoder: Decoder = "ffcv",
    ) -> None:
        self.views, self.groups = view_table(crops), views_by_size(crops)
        if workers < 1 or batches_ahead < 1:
            raise ValueError(f"workers and batches_ahead must be at least 1, got {workers} and {batches_ahead}")
        self.beton, self.workers, self.batches_ahead = Path(beton), workers, batches_ahead
        self.skips_bad_samples = on_bad_sample == "skip"
        self.bad_samples: dict[int, str] = {}
        summary = check_beton(self.beton, num_classes=None, require_labels=False)
        if os_cache:
            check_cached(self.beton)
        self.os_cache = can_be_cached(self.beton) if os_cache is None else os_cache
        self.identity = _identity(os.stat(self.beton))
        self.records = record_table(summary)
        self.scratch_bytes = scratch_bytes(self.records)
        self._scratch, self._warning = threading.local(), threading.Lock()
        self.labels = np.full(summary.num_samples, -1, np.int64) if summary.labels is None else summary.labels
        self.seed = as_uint64(seed)[0]
        self.pinned = torch.cuda.is_available()
        self.executor = ThreadPoolExecutor(workers, thread_name_prefix="view-loader")
        self._decode_views = decode_views_by(decoder)
        self._compile()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads; passes that are still under way fail."""
        self.executor.shutdown(wait=True, cancel_futures=True)

    @property
    def num_samples(self) -> int:
        return len(self.records)

    @property
    def bytes_per_sample(self) -> int:
        """Of one sample's views."""
        return sum(count * size * size * 3 for size, count in self.groups)

    def batches(self, indices: np.ndarray, epoch: int) -> "ViewBatches":
        """Loads the samples of `indices`, batch by batch; decoding starts at once.

        Args:
            indices: (batches, n) int64 samples; -1 is padding and dropped, so that a batch may be smaller, or empty.
            epoch: of the crops and flips.

        Returns an iterator of Batch, also a context manager; closing it, or reaching its end, leaves nothing at work.

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
        none, nothing = np.empty(0, np.int64), np.empty(0, np.uint8)
        self._decode_views(-1, self.records, none, 0, 0, self.views, self.seed, self.seed, nothing, nothing)

    def _decode(self, file: int, epoch: np.uint64, batch: np.ndarray, images: np.ndarray, places: slice) -> int:
        """Fills in the views of `batch[places]`, in a worker thread; returns how many samples it had to replace there.

        batch: (N,) the whole batch, into which the samples that take a bad one's place are written. images: its buffer.
        """
        wanted = batch[places].copy()
        try:
            replaced = self._decode_chunk(file, epoch, batch, images, places, wanted)
        except LoaderError:
            raise
        except Exception as error:
            others = f", or one of the {len(wanted) - 1} behind it in its batch," if len(wanted) > 1 else ""
            title = sample_title(self.beton, int(wanted[0]))
            raise LoaderError(f"{title}{others} cannot be loaded: {error!r}") from error
        if not self.os_cache:
            self._advise(file, wanted, os.POSIX_FADV_DONTNEED)
        return replaced

    def _decode_chunk(
        self, file: int, epoch: np.uint64, batch: np.ndarray, images: np.ndarray, places: slice, wanted: np.ndarray
    ) -> int:
        first, replaced = places.start, 0
        while True:
            indices = batch[first : places.stop]
            position, status = self._decode_views(
                file,
                self.records,
                indices,
                first,
                len(batch),
                self.views,
                self.seed,
                epoch,
                self._scratch_for(indices),
                images,
            )
            if status == DECODED:
                return int(replaced)
            first += position
            original = wanted[first - places.start]
            replaced += batch[first] == original
            batch[first] = self._instead(batch[first], original, status)

    def _scratch_for(self, indices: np.ndarray) -> np.ndarray:
        """This thread's memory for decoding: new memory would cost more than some decoding does."""
        needed = int(self.scratch_bytes[indices].max())
        if len(getattr(self._scratch, "bytes", ())) < needed:
            self._scratch.bytes = np.empty(needed, np.uint8)
        return self._scratch.bytes

    def _instead(self, bad: int, original: int, status: int) -> int:
        """The sample that takes the place of a bad one; raises LoaderError where none may."""
        message = f"{sample_title(self.beton, bad)} cannot be loaded: {FAILURES[status]}"
        if not self.skips_bad_samples or status not in (DAMAGED, OTHER_SIZE):
            raise LoaderError(message)
        if (bad - original) % self.num_samples >= min(MOST_SKIPPED_IN_A_ROW, self.num_samples) - 1:
            raise LoaderError(f"{message}, and neither can those before it, from sample {original} on")
        instead = (bad + 1) % self.num_samples
        with self._warning:
            if bad not in self.bad_samples:
                self.bad_samples[int(bad)] = FAILURES[status]
                print(f"warning: {message}; sample {instead} takes its place", file=sys.stderr)
        return instead

    def _advise(self, file: int, indices: np.ndarray, advice: int) -> None:
        for record in self.records[indices]:
            os.posix_fadvise(file, int(record["offset"]), int(record["size"]), advice)

    def _by_size(self, images: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        """The views of `count` samples in a batch's buffer."""
        parts = images.split([count * views * size * size * 3 for size, views in self.groups])
        shapes = [(count, views, size, size, 3) for size, views in self.groups]
        return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def memory_needed(
    crops: Sequence[CropSpec], batch_size: int, *, batches_ahead: int, workers: int, image_bytes: int, samples: int
) -> int:
    """Bytes that a pass takes at most, whatever the size of the batch's images before they are cropped.

    `batches_ahead` batches of views, the one that is handed over and the one that the consumer still holds; for every
    worker the largest image, decoded, and its record, together `image_bytes`; 56 bytes for every sample of the file.
    """
    views = sum(crop.size**2 * 3 for crop in crops)
    return (batches_ahead + 2) * batch_size * views + workers * image_bytes + samples * BYTES_PER_SAMPLE


class ViewBatches:
    """One pass over batches of views: an iterator to be closed. Made by ViewLoader.batches."""

    def __init__(self, loader: ViewLoader, indices: np.ndarray, epoch: np.uint64) -> None:
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
        return Batch(self._loader._by_size(images, len(indices)), labels, torch.from_numpy(indices), skipped)

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
            self._loader._scratch = threading.local()  # the threads stay, their memory need not
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
        size = len(indices) * loader.bytes_per_sample
        # torch uses pinned memory again by itself.
        images = torch.empty(size, dtype=torch.uint8, pin_memory=True) if loader.pinned else self._buffers.take(size)
        if not loader.os_cache:
            loader._advise(self._file, indices, os.POSIX_FADV_WILLNEED)
        chunk = max(1, -(-len(indices) // (loader.workers * CHUNKS_PER_WORKER)))
        # The workers hold no reference to this iterator, so that dropping it closes it, and in the consumer's thread.
        decode = partial(loader._decode, self._file, self._epoch, indices, images.numpy())
        chunks = [
            loader.executor.submit(decode, slice(start, min(start + chunk, len(indices))))
            for start in range(0, len(indices), chunk)
        ]
        self._pending.append((indices, images, chunks))


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """What changes when a file is written to or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
