"""A file that is streamed leaves no trace in the system's page cache; one that is cached stays in it."""

import ctypes
import mmap
import os

import numpy as np
import pytest

from varscale.data.beton import MODE_RAW, BetonWriter
from varscale.data.decoders import installed_decoder
from varscale.data.geometry import CropSpec
from varscale.data.loader import ViewLoader

COUNT, SIDE = 120, 200


def cached_share(path):
    """How much of a file lies in the page cache: the share of its pages."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        content = np.frombuffer(memory, np.uint8)
        pages = np.zeros(-(-len(content) // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        places = ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content)), ctypes.c_void_p(pages.ctypes.data)
        assert libc.mincore(*places) == 0, os.strerror(ctypes.get_errno())
        del content
    return (pages & 1).mean()


def forget(path):
    """Drops a file, once it is on the disk, from the page cache."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    path = tmp_path_factory.mktemp("streaming") / "x.beton"
    with BetonWriter(path, COUNT) as writer:
        for index in range(COUNT):
            writer.append(MODE_RAW, SIDE, SIDE, bytes([index]) * (SIDE * SIDE * 3), index)
    forget(path)
    if cached_share(path) > 0.05:
        pytest.skip(f"the file system of {path} has no page cache to be emptied, as one in memory has none")
    return path


# The images are 86 % of the file; the rest is room between its pages, which nobody reads.
@pytest.mark.parametrize(("os_cache", "low", "high"), [(False, 0.0, 0.2), (True, 0.75, 1.0)])
def test_only_what_is_to_be_cached_stays_in_the_page_cache(beton, os_cache, low, high):
    options = {"seed": 0, "workers": 2, "decoder": installed_decoder(), "os_cache": os_cache}
    order = np.random.default_rng(0).permutation(COUNT).reshape(-1, 8)
    with ViewLoader(beton, [CropSpec(8, None)], **options) as loader:
        forget(beton)
        with loader.batches(order, epoch=0) as batches:
            assert sum(len(batch.indices) for batch in batches) == COUNT
    assert low <= cached_share(beton) <= high
