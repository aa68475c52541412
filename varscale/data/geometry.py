"""Where views lie in their images: crops and flips from counter-based random numbers.

Crops follow torchvision's RandomResizedCrop and RandomHorizontalFlip. Seed and epoch reach the compiled code as
arguments: it freezes Python's values when it is compiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import exp, log, sqrt
from typing import Literal

import numpy as np

from varscale.config.schema import DataConfig
from varscale.data.compiled import compiled
from varscale.data.randomness import GEOMETRIC_DRAWS, uniform

CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop

# A view as data, so that the code is compiled once for all crops. A batch's views lie in one buffer, size by size: the
# pixels of image n of N begin at `before` x N + `stride` x n + `within`.
VIEW = np.dtype(
    [
        ("size", "i8"),
        ("before", "i8"),
        ("stride", "i8"),
        ("within", "i8"),
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


def training_crops(data: DataConfig) -> list[CropSpec]:
    """The views of a run's images, the large ones first; under the policy `none` each is the evaluation crop."""
    scales = [data.crop_scale] * data.views + [data.local_scale] * data.local_views
    sizes = [data.image_size] * data.views + [data.local_size] * data.local_views
    if data.augmentation == "none":
        return [CropSpec(size, None, flip=0.0, interpolation=data.interpolation) for size in sizes]
    return [
        CropSpec(size, scale, data.crop_ratio, data.flip, data.interpolation)
        for size, scale in zip(sizes, scales, strict=True)
    ]


def views_by_size(crops: Sequence[CropSpec]) -> list[tuple[int, int]]:
    """The sizes of views and how many there are of each, in order.

    Raises ValueError where there is no crop, or where crops of one size do not stand together.
    """
    groups = [(size, len(list(group))) for size, group in groupby(crop.size for crop in crops)]
    if not groups or len(groups) > len({size for size, _ in groups}):
        raise ValueError(f"crops must be at least one, those of a size together; got {[c.size for c in crops]}")
    return groups


def view_table(crops: Sequence[CropSpec]) -> np.ndarray:
    """The crops as (V,) VIEW records for the compiled code. Raises ValueError as `views_by_size` does."""
    table = np.zeros(len(crops), VIEW)
    number, before = 0, 0
    for size, count in views_by_size(crops):
        pixels = size * size * 3
        group = table[number : number + count]
        group["size"], group["before"], group["stride"] = size, before, count * pixels
        group["within"] = np.arange(count) * pixels
        number, before = number + count, before + count * pixels
    for row, crop in zip(table, crops, strict=True):
        row["is_random"] = crop.scale is not None
        row["is_bicubic"] = crop.interpolation == "bicubic"
        row["low_area"], row["high_area"] = crop.scale or (1.0, 1.0)
        row["low_log_ratio"], row["high_log_ratio"] = log(crop.ratio[0]), log(crop.ratio[1])
        row["flip"] = crop.flip
    return table


@compiled
def crop_geometry(height, width, view, key):
    """Where a view lies in its image. view: VIEW record. key: uint64, the view's random stream.

    Returns (rows, columns, flip) as `resample` takes them.
    """
    size = view.size
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


def evaluation_crop(height: int, width: int, size: int) -> tuple[tuple, tuple]:
    """Resize the shorter side, cut the centre: torchvision's Resize and CenterCrop without the pixels in between.

    Returns (rows, columns) as `resample` takes them.
    """
    shorter = min(height, width)
    resized = round(size * 256 / 224) if shorter > size else size
    resized_height, resized_width = resized * height // shorter, resized * width // shorter
    rows = (0, height, resized_height, round((resized_height - size) / 2))
    columns = (0, width, resized_width, round((resized_width - size) / 2))
    return rows, columns


_evaluation_crop = compiled(evaluation_crop)
