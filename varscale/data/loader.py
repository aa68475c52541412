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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import torch

from varscale.data.beton import check_beton
from varscale.data.decoders import Decoder, decode_views_by
from varscale.data.geometry import CropSpec, view_table, views_by_size
from varscale.data.memory import can_be_cached, check_cached
from varscale.data.names import sample_title
from varscale.data.passes import Batch, LoaderError, ViewBatches, identity
from varscale.data.randomness import as_uint64
from varscale.data.records import DAMAGED, DECODED, FAILURES, OTHER_SIZE, RECORD, record_table, scratch_bytes

__all__ = ["Batch", "LoaderError", "ViewBatches", "ViewLoader", "memory_needed"]

BYTES_PER_SAMPLE = RECORD.itemsize + 8 + 8  # its label, and the memory it takes
MOST_SKIPPED_IN_A_ROW = 100  # more bad samples next to each other are no accident


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
        self.identity = identity(os.stat(self.beton))
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

    def decode(self, file: int, epoch: np.uint64, batch: np.ndarray, images: np.ndarray, places: slice) -> int:
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
            self.advise(file, wanted, os.POSIX_FADV_DONTNEED)
        return replaced

    def _decode_chunk(
        self, file: int, epoch: np.uint64, batch: np.ndarray, images: np.ndarray, places: slice, wanted: np.ndarray
    ) -> int:
        """As `decode`; wanted: (n,) the samples of `batch[places]` that were asked for."""
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

    def forget_scratch(self) -> None:
        """Frees the threads' memory for decoding: they stay, it need not."""
        self._scratch = threading.local()

    def _scratch_for(self, indices: np.ndarray) -> np.ndarray:
        """This thread's memory for decoding: new memory would cost more than some decoding does."""
        needed, scratch = int(self.scratch_bytes[indices].max()), self._scratch  # which another pass may forget
        if len(getattr(scratch, "bytes", ())) < needed:
            scratch.bytes = np.empty(needed, np.uint8)
        return scratch.bytes

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

    def advise(self, file: int, indices: np.ndarray, advice: int) -> None:
        for record in self.records[indices]:
            os.posix_fadvise(file, int(record["offset"]), int(record["size"]), advice)

    def by_size(self, images: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
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
    Where there is a GPU batches are pinned, and torch takes the next power of two for each.
    """
    batch = batch_size * sum(crop.size**2 * 3 for crop in crops)
    if torch.cuda.is_available():
        batch = 1 << (batch - 1).bit_length()
    return (batches_ahead + 2) * batch + workers * image_bytes + samples * BYTES_PER_SAMPLE
