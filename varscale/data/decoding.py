"""The compiled path from bytes in a .beton to views: each image is decoded once, by FFCV's decoder, then cut V times.

Crops follow torchvision's RandomResizedCrop and RandomHorizontalFlip, with counter-based random numbers; seed and epoch
are arguments of the compiled code, which freezes Python's values when it is compiled.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Literal

import llvmlite.binding
import numpy as np
from numba import types

from varscale.data import libffcv
from varscale.data.compiled import compiled
from varscale.data.randomness import GEOMETRIC_DRAWS, stream, uniform
from varscale.data.resampling import resample

if libffcv.imdecode() is None:
    raise ImportError("FFCV's decoder is missing: FFCV is not installed, or was built for other system libraries")

CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop

# What the compiled code needs of a sample and of a view, as data, so that it is compiled once for all files and crops.
RECORD = np.dtype([("offset", "u8"), ("size", "i8"), ("height", "i8"), ("width", "i8"), ("is_jpeg", "?")], align=True)
VIEW = np.dtype(
    [
        ("is_random", "?"),
        ("is_bicubic", "?"),
        ("low_area", "f8"),
        ("high_area", "f8"),
        ("low_log_ratio", "f8"),
        ("high_log_ratio", "f8"),
        ("flip", "f8"),
    ],
    align=True,
)

DECODED, FILE_TOO_SHORT, OTHER_SIZE, DAMAGED = 0, 1, 2, 3
FAILURES = {
    FILE_TOO_SHORT: "the file ends, or cannot be read, before its record does",
    OTHER_SIZE: "its JPEG header is damaged: it does not give the size in the file's metadata",
    DAMAGED: "its JPEG data are damaged",
}

# By name, not by address: code that holds an address could not be kept on disk.
llvmlite.binding.add_symbol("ffcv_imdecode", ctypes.cast(libffcv.imdecode(), ctypes.c_void_p).value)
_size, _flag = types.uint32, types.boolean
_decode_jpeg = types.ExternalFunction(
    "ffcv_imdecode",
    types.int32(types.uintp, types.uint64, _size, _size, types.uintp, *[_size] * 6, _flag, _flag),
)
_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))


@dataclass(frozen=True)
class CropSpec:
    """How one view is cut from an image.

    Attributes:
        size: height and width of the view, in pixels.
        scale: range of the crop's share of the image's area; None means the deterministic evaluation crop (no flip):
            the shorter side resized to round(size * 256 / 224), or to `size` where it is not longer than that, then
            the central size x size pixels.
        ratio: range of the crop's width / height, sampled uniformly in its logarithm.
        flip: probability of mirroring left to right.
        interpolation: antialiased resampling filter.
    """

    size: int
    scale: tuple[float, float] | None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must satisfy 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must satisfy 0 < low <= high, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a probability, got {self.flip}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', got {self.interpolation!r}")


def view_table(crops: Sequence[CropSpec]) -> np.ndarray:
    """The crops as (V,) VIEW records for the compiled code."""
    table = np.zeros(len(crops), VIEW)
    for row, crop in zip(table, crops, strict=True):
        row["is_random"] = crop.scale is not None
        row["is_bicubic"] = crop.interpolation == "bicubic"
        row["low_area"], row["high_area"] = crop.scale or (1.0, 1.0)
        row["low_log_ratio"], row["high_log_ratio"] = log(crop.ratio[0]), log(crop.ratio[1])
        row["flip"] = crop.flip
    return table


@compiled
def decode_views(file, records, indices, views, seed, epoch, images):
    """Reads and decodes samples, each once, and cuts their views; touches no Python object, holds no lock.

    file: descriptor of the open .beton. records: (num_samples,) RECORD. indices: (n,) int64 samples.
    views: (V,) VIEW. seed, epoch: uint64. images: (n, V, size, size, 3) uint8, written.

    Returns (position, status): (-1, DECODED), or the first position that failed and one of FAILURES.
    """
    largest_record, largest_image = 0, 0
    for index in indices:
        record = records[index]
        largest_image = max(largest_image, record.height * record.width * 3)
        if record.is_jpeg:
            largest_record = max(largest_record, record.size)
    compressed = np.empty(largest_record, np.uint8)
    pixels = np.empty(largest_image, np.uint8)
    size = images.shape[2]
    for position in range(len(indices)):
        record = records[indices[position]]
        height, width = record.height, record.width
        image = pixels[: height * width * 3].reshape(height, width, 3)
        status = _load(file, record, compressed, image)
        if status != DECODED:
            return position, status
        for view in range(len(views)):
            key = stream(seed, epoch, np.uint64(indices[position]), np.uint64(view))
            rows, columns, flip = crop_geometry(height, width, size, views[view], key)
            resample(image, rows, columns, flip, views[view].is_bicubic, images[position, view])
    return -1, DECODED


@compiled
def _load(file, record, compressed, image):
    if not record.is_jpeg:
        return DECODED if _read_fully(file, record.offset, image.reshape(-1)) else FILE_TOO_SHORT
    jpeg = compressed[: record.size]
    if not _read_fully(file, record.offset, jpeg):
        return FILE_TOO_SHORT
    # TurboJPEG would scale a picture of another size to fit, and FFCV's imdecode would call that a success.
    if jpeg_size(jpeg) != (record.height, record.width):
        return OTHER_SIZE
    height, width = record.height, record.width
    # Warnings count as failures: they are how TurboJPEG tells of missing data, which it fills with grey.
    jpeg_at, image_at = jpeg.ctypes.data, image.ctypes.data
    status = _decode_jpeg(jpeg_at, jpeg.size, height, width, image_at, height, width, 0, 0, 1, 1, False, False)
    return DECODED if status == 0 else DAMAGED


@compiled
def _read_fully(file, offset, destination):
    done = 0
    while done < destination.size:
        left = destination[done:]
        count = _pread(file, left.ctypes.data, left.size, offset + np.uint64(done))
        if count <= 0:
            return False
        done += count
    return True


@compiled
def jpeg_size(jpeg):
    """(height, width) from a JPEG's frame header (ITU-T T.81, B.2.2); (0, 0) where none is found."""
    at = 2
    while at + 8 < jpeg.size and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        is_frame = 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC
        if is_frame:
            return jpeg[at + 5] * 256 + jpeg[at + 6], jpeg[at + 7] * 256 + jpeg[at + 8]
        at += 2 + jpeg[at + 2] * 256 + jpeg[at + 3]
    return 0, 0


@compiled
def crop_geometry(height, width, size, view, key):
    """Where a view lies in its image. view: VIEW record. key: uint64, the view's random stream.

    Returns (rows, columns, flip) as `resample` takes them.
    """
    if not view.is_random:
        rows, columns = _evaluation_crop(height, width, size)
        return rows, columns, False
    top, left, crop_height, crop_width = _random_crop(height, width, view, key)
    flip = uniform(key, np.uint64(GEOMETRIC_DRAWS)) < view.flip
    return (top, crop_height, size, 0), (left, crop_width, size, 0), flip


@compiled
def _random_crop(height, width, view, key):
    """torchvision's RandomResizedCrop.get_params: attempts at a random box, then the largest central one."""
    draw = GEOMETRIC_DRAWS + 1
    for _ in range(CROP_ATTEMPTS):
        share = view.low_area + (view.high_area - view.low_area) * uniform(key, np.uint64(draw))
        log_ratio = view.low_log_ratio + (view.high_log_ratio - view.low_log_ratio) * uniform(key, np.uint64(draw + 1))
        area, ratio = height * width * share, exp(log_ratio)
        crop_height, crop_width = round(sqrt(area / ratio)), round(sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(uniform(key, np.uint64(draw + 2)) * (height - crop_height + 1))
            left = int(uniform(key, np.uint64(draw + 3)) * (width - crop_width + 1))
            return top, left, crop_height, crop_width
        draw += 4
    low_ratio, high_ratio = exp(view.low_log_ratio), exp(view.high_log_ratio)
    crop_height, crop_width = height, width
    if width / height < low_ratio:
        crop_height = round(width / low_ratio)
    elif width / height > high_ratio:
        crop_width = round(height * high_ratio)
    # A ratio next to an integer may round up by one: never beyond the image, nor to nothing.
    crop_height, crop_width = max(min(crop_height, height), 1), max(min(crop_width, width), 1)
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@compiled
def _evaluation_crop(height, width, size):
    """Resize the shorter side, cut the centre: torchvision's Resize and CenterCrop without the pixels in between."""
    shorter = min(height, width)
    resized = round(size * 256 / 224) if shorter > size else size
    resized_height, resized_width = resized * height // shorter, resized * width // shorter
    rows = (0, height, resized_height, round((resized_height - size) / 2))
    columns = (0, width, resized_width, round((resized_width - size) / 2))
    return rows, columns
