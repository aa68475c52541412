"""Memory for batches, used again once nobody refers to it: the system clears new memory page by page."""

import weakref
from collections import deque

import numpy as np
import torch


class Buffers:
    """Buffers of up to `size` bytes. It keeps `kept` of them while they are not in use."""

    def __init__(self, size: int, kept: int) -> None:
        self._size = size
        self._free: deque[np.ndarray] = deque(maxlen=kept)

    def take(self, size: int) -> torch.Tensor:
        """(size,) uint8 of any content, the caller's own as long as the tensor, or a view of it, is there."""
        memory = self._free.pop() if self._free else np.empty(self._size, np.uint8)
        used = memory[:size]
        weakref.finalize(used, self._free.append, memory).atexit = False
        return torch.from_numpy(used)  # which keeps `used` until its storage is freed
