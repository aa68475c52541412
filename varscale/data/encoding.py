"""Encodes a source's images in order, a chunk at a time, in this process or in several."""

import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from traceback import format_exc

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
    crew = [_Worker(options) for _ in range(workers)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in crew:
        idle.put(worker)

    def encode(contents: list[Content]) -> StoredChunk:
        worker = idle.get()
        try:
            return worker.encode(contents)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(workers)
    try:
        yield lambda split, start: _in_order(threads, encode, _chunks(split, start), ahead=2 * workers)
    finally:
        for worker in crew:
            worker.end()
        threads.shutdown(cancel_futures=True)


class _Worker:
    """A process that encodes, behind a pipe of its own, which ends with it.

    Those of concurrent.futures write into one pipe: of one that is killed while it writes, the rest would be waited
    for without end.
    """

    def __init__(self, options: ImageOptions) -> None:
        context = get_context("spawn")  # a fork of a process with threads (numba's, torch's) may hang
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, options), daemon=True)
        self.process.start()
        theirs.close()

    def encode(self, contents: list[Content]) -> StoredChunk:
        try:
            self.pipe.send(contents)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise UserError("a worker process died, perhaps for want of memory: try fewer --workers") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        self.process.terminate()
        self.process.join()


def _serve(pipe: Connection, options: ImageOptions) -> None:
    """What a worker does until its parent ends, to which it leaves Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_answer(pipe.recv(), options))


def _answer(contents: list[Content], options: ImageOptions) -> StoredChunk | Exception:
    try:
        return encode_chunk(contents, options)
    except Exception as error:
        if not isinstance(error, UserError):
            error.add_note(f"in a worker process:\n{format_exc()}")
        return error


def _in_order(
    threads: ThreadPoolExecutor,
    encode: Callable[[list[Content]], StoredChunk],
    chunks: Iterator[list[Content]],
    ahead: int,
) -> Iterator[StoredChunk]:
    """Results in the order of the tasks, of which at most `ahead` wait, so that memory stays bounded."""
    running = deque()
    for contents in chunks:
        running.append(threads.submit(encode, contents))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _chunks(split: Split, start: int) -> Iterator[list[Content]]:
    num_samples = len(split.labels)
    for first in range(start, num_samples, CHUNK):
        yield [split.content(index) for index in range(first, min(first + CHUNK, num_samples))]
