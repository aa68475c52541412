"""The fixed-point resampler against torchvision's antialiased uint8 resize."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from varscale.data.resampling import resample

FILTERS = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def resized_crop(image, top, left, height, width, size, interpolation, flip=False):
    view = np.full((size, size, 3), 77, np.uint8)
    resample(image, (top, height, size, 0), (left, width, size, 0), flip, interpolation == "bicubic", view)
    return view


def torchvision_crop(image, top, left, height, width, size, interpolation):
    channels = torch.from_numpy(image).permute(2, 0, 1)
    mode = FILTERS[interpolation]
    view = F.resized_crop(channels, top, left, height, width, [size, size], interpolation=mode, antialias=True)
    return view.permute(1, 2, 0).numpy()


def random_image(random, height, width, kind):
    """Noise, or black and white pixels, the hardest case for a filter that overshoots."""
    values = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return values if kind == "noise" else np.where(values < 128, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("kind", ["noise", "black and white"])
def test_equals_torchvision_within_one_level(interpolation, kind):
    random = np.random.default_rng(0)
    smaller = larger = 0
    for _ in range(150):
        image_height, image_width, size = random.integers([20, 20, 1], [300, 300, 160]).tolist()
        image = random_image(random, image_height, image_width, kind)
        height, width = random.integers(1, [image_height + 1, image_width + 1]).tolist()
        top = int(random.integers(0, image_height - height + 1))
        left = int(random.integers(0, image_width - width + 1))
        view = resized_crop(image, top, left, height, width, size, interpolation)
        expected = torchvision_crop(image, top, left, height, width, size, interpolation)
        assert np.abs(view.astype(int) - expected).max() <= 1
        smaller += size < min(height, width)
        larger += size > max(height, width)
    assert min(smaller, larger) > 20


@pytest.mark.parametrize("interpolation", FILTERS)
def test_a_crop_of_the_output_size_is_copied(interpolation):
    image = random_image(np.random.default_rng(1), 50, 40, "noise")
    np.testing.assert_array_equal(resized_crop(image, 7, 3, 32, 32, 32, interpolation), image[7:39, 3:35])


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [20, 31, 64])
def test_flip_mirrors_the_view(interpolation, size):
    image = random_image(np.random.default_rng(2), 60, 45, "noise")
    plain = resized_crop(image, 2, 5, 50, 37, size, interpolation)
    np.testing.assert_array_equal(resized_crop(image, 2, 5, 50, 37, size, interpolation, flip=True), plain[:, ::-1])


@pytest.mark.parametrize("interpolation", FILTERS)
def test_part_of_a_resized_image_equals_the_cut(interpolation):
    image = random_image(np.random.default_rng(3), 90, 120, "noise")
    view = np.zeros((32, 32, 3), np.uint8)
    resample(image, (0, 90, 48, 8), (0, 120, 64, 16), False, interpolation == "bicubic", view)
    channels = torch.from_numpy(image).permute(2, 0, 1)
    whole = F.resize(channels, [48, 64], interpolation=FILTERS[interpolation], antialias=True).permute(1, 2, 0).numpy()
    assert np.abs(view.astype(int) - whole[8:40, 16:48]).max() <= 1


def test_a_flat_image_stays_flat():
    for level in (0, 1, 127, 254, 255):
        image = np.full((61, 47, 3), level, np.uint8)
        for interpolation in FILTERS:
            assert (resized_crop(image, 0, 0, 61, 47, 29, interpolation) == level).all()


GUARDED = """
import ctypes, mmap
import subprocess
import sys

import numpy as np
from varscale.data.resampling import resample
pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
memory = np.frombuffer(pages, np.uint8, mmap.PAGESIZE)
for height in range(1, 8):
    for width in range(1, 41):
        image = memory[mmap.PAGESIZE - height * width * 3 :].reshape(height, width, 3)
        for size in (1, 2, 3, 5, 16):
            for bicubic in (False, True):
                view = np.empty((size, size, 3), np.uint8)
                resample(image, (0.0, float(height), size, 0), (0.0, float(width), size, 0), False, bicubic, view)
print("unharmed")
"""


def test_nothing_is_read_behind_an_image():
    # Behind it lies a page that must not be read: the process would end.
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert done.stdout == "unharmed\n", done.stderr
