"""How many images and bytes pass in a second, shown while they do and told at the end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Throughput:
    """Images and bytes that have passed since it was made.

    Args:
        verb: what happens to the bytes: `read` or `written`.
        progress: show bars on stderr.
    """

    def __init__(self, verb: str, *, progress: bool) -> None:
        self.verb, self.progress = verb, progress
        self.images = self.num_bytes = 0
        self.seconds = 0.0
        self._start = time.monotonic()

    @contextmanager
    def bar(self, title: str, total: int, initial: int = 0) -> Iterator[None]:
        """Shows what `count` is told inside the block as a part of `total` images."""
        with tqdm(
            desc=title, total=total, initial=initial, unit=" images", disable=not self.progress, mininterval=0.5
        ) as self._bar:
            yield

    def count(self, images: int, num_bytes: int) -> None:
        self.images += images
        self.num_bytes += num_bytes
        self.seconds = time.monotonic() - self._start
        self._bar.set_postfix_str(self._bytes_per_second(), refresh=False)
        self._bar.update(images)

    def __str__(self) -> str:
        images_per_second = self.images / self.seconds
        return (
            f"{self.images:,} images in {self.seconds:,.1f} s: {images_per_second:,.0f} images/s, "
            f"{self._bytes_per_second()}"
        )

    def _bytes_per_second(self) -> str:
        return f"{self.num_bytes / 1e6 / self.seconds:,.1f} MB/s {self.verb}"
