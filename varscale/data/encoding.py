"""Encodes a source's images in order, a chunk at a time, in this process or in several."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process

from varscale.data.images import Content, ImageOptions, StoredChunk, encode_chunk
from varscale.data.sources import Split
from varscale.errors import UserError

CHUNK = 32  # images a task: small enough to keep few in memory, large enough to hide a task's cost

Encoder = Callable[[Split, int], Iterator[StoredChunk]]


@contextmanager
def chunk_encoder(workers: int, options: ImageOptions) -> Iterator[Encoder]:
    """Yields a function that encodes a split in order, from a position on, in so many processes.

    Raises:
        UserError: a file cannot be read, or a process died.
    """
    if workers == 1:
        yield lambda split, start: (encode_chunk(contents, options) for contents in _chunks(split, start))
        return
    # Spawned, not forked: a fork of a process with threads (numba's, torch's) may hang.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        yield lambda split, start: _encode_in_order(pool, _chunks(split, start), options, ahead=2 * workers)
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for want of memory: try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_in_order(
    pool: ProcessPoolExecutor, chunks: Iterator[list[Content]], options: ImageOptions, ahead: int
) -> Iterator[StoredChunk]:
    """Results in the order of the tasks, of which at most `ahead` wait, so that memory stays bounded."""
    running = deque()
    for contents in chunks:
        running.append(pool.submit(encode_chunk, contents, options))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _chunks(split: Split, start: int) -> Iterator[list[Content]]:
    num_samples = len(split.labels)
    for first in range(start, num_samples, CHUNK):
        yield [split.content(index) for index in range(first, min(first + CHUNK, num_samples))]


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent process, and ends with it should it be killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)
