"""The operations of `varscale.data.colour` for GPUs, in Triton: one program an image, which reads it twice at most.

torch launches dozens of kernels a view, each of which reads and writes all images. Here a block of pixels goes through
all operations of its image, in the image's own order, and is written once, normalised; only the mean grey value that
contrast needs takes a pass of its own. Images to be blurred are set aside, for torch's matrix products, and finished by
a second kernel. All stays within 1e-4 of torchvision's on the same parameters, as in `varscale.data.compiled_colour`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from varscale.data.colour import LUMA, SMALLEST_CHROMA
from varscale.triton_launch import launch

PIXELS, WARPS = 1024, 8  # of an image, that a program holds at a time, and how many warps share them

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = (tl.constexpr(operation) for operation in range(4))
_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in LUMA)
_CHROMA = tl.constexpr(SMALLEST_CHROMA)
_LEVEL = tl.constexpr(1 / 255)
# Columns of the parameters, one row for each image of each view.
_FACTORS, _ORDER, _BEFORE_CONTRAST, _GRAYSCALE, _SOLARIZE, _PLACE = (
    tl.constexpr(column) for column in (0, 4, 8, 9, 10, 11)
)
_COLUMNS = tl.constexpr(12)


def pack(factors: Tensor, positions: Tensor, grayscale: Tensor, solarize: Tensor, blurred: Tensor) -> Tensor:
    """The kernels' parameters, (M, 12) float32. factors, positions: (M, 4), as `varscale.data.colour.jitter_` takes
    them. grayscale: (M,) bool. solarize: (M,) float, thresholds. blurred: (B,) int64, the rows to be set aside."""
    place = torch.full((len(factors), 1), -1.0)
    place[blurred, 0] = torch.arange(len(blurred), dtype=torch.float32)
    columns = (factors, positions.argsort(1), positions[:, 1:2], grayscale[:, None], solarize[:, None], place)
    return torch.cat([column.to(torch.float32) for column in columns], 1)


def augment(
    images: Tensor, parameters: Tensor, scale: Tensor, shift: Tensor, output: Tensor, planes: Tensor | None = None
) -> None:
    """Colour jitter, grayscale, solarise and normalise.

    images: (N, V, H, W, 3) uint8, the pixels of each image contiguous. parameters: (V * N, 12), see `pack`. scale,
    shift: 3 float32. output: (V * N, 3, H, W) in channels-last layout, written: value x scale + shift. planes:
    (B, 3, H, W) float32, contiguous, takes the rows set aside, after the jitter; None where there are none.
    """
    count, views, height, width, _ = images.shape
    launch(_augment_images, (views * count,))(
        images, parameters, scale, shift, output, planes, *images.stride()[:2], count, height * width,
        planes is not None, PIXELS, num_warps=WARPS,
    )  # fmt: skip


def finish(planes: Tensor, rows: Tensor, parameters: Tensor, scale: Tensor, shift: Tensor, output: Tensor) -> None:
    """What `augment` does behind the jitter, for what it has set aside. rows: (B,) int64, of parameters and output."""
    pixels = planes.shape[2] * planes.shape[3]
    launch(_finish_planes, (len(planes), triton.cdiv(pixels, PIXELS)))(
        planes, rows, parameters, scale, shift, output, pixels, PIXELS, num_warps=WARPS
    )


@triton.jit
def _augment_images(
    images, parameters, scale, shift, output, planes, image_stride, view_stride, count, pixels,
    SETS_ASIDE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    image = images + (row % count).to(tl.int64) * image_stride + (row // count).to(tl.int64) * view_stride
    parameters += row * _COLUMNS
    output += row.to(tl.int64) * 3 * pixels
    mean = 0.0
    if tl.load(parameters + _FACTORS + _CONTRAST) != 1.0:
        before = tl.load(parameters + _BEFORE_CONTRAST).to(tl.int32)
        sums = tl.zeros((PIXELS,), tl.float32)
        for start in range(0, pixels, PIXELS):
            pixel = start + tl.arange(0, PIXELS)
            red, green, blue = _load(image, pixel, pixel < pixels)
            red, green, blue = _jitter(red, green, blue, parameters, before, 0.0)
            sums += tl.where(pixel < pixels, _grey(red, green, blue), 0.0)
        mean = tl.sum(sums) / pixels
    place = -1
    if SETS_ASIDE:
        place = tl.load(parameters + _PLACE).to(tl.int32)
        planes += tl.maximum(place, 0).to(tl.int64) * 3 * pixels
    for start in range(0, pixels, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        inside = pixel < pixels
        red, green, blue = _load(image, pixel, inside)
        red, green, blue = _jitter(red, green, blue, parameters, 4, mean)
        if place < 0:
            _finish(red, green, blue, parameters, scale, shift, output, pixel, inside)
        elif SETS_ASIDE:
            tl.store(planes + pixel, red, inside)
            tl.store(planes + pixels + pixel, green, inside)
            tl.store(planes + 2 * pixels + pixel, blue, inside)


@triton.jit
def _finish_planes(planes, rows, parameters, scale, shift, output, pixels, PIXELS: tl.constexpr):
    row = tl.load(rows + tl.program_id(0))
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    planes += tl.program_id(0).to(tl.int64) * 3 * pixels
    red = tl.load(planes + pixel, inside, 0.0)
    green = tl.load(planes + pixels + pixel, inside, 0.0)
    blue = tl.load(planes + 2 * pixels + pixel, inside, 0.0)
    output += row * 3 * pixels
    _finish(red, green, blue, parameters + row * _COLUMNS, scale, shift, output, pixel, inside)


@triton.jit
def _load(image, pixel, inside):
    red = tl.load(image + 3 * pixel, inside, 0).to(tl.float32) * _LEVEL
    green = tl.load(image + 3 * pixel + 1, inside, 0).to(tl.float32) * _LEVEL
    blue = tl.load(image + 3 * pixel + 2, inside, 0).to(tl.float32) * _LEVEL
    return red, green, blue


@triton.jit
def _jitter(red, green, blue, parameters, count, mean):
    """The first `count` operations in the order of an image whose mean grey value, before contrast, is `mean`."""
    for place in range(count):
        operation = tl.load(parameters + _ORDER + place).to(tl.int32)
        factor = tl.load(parameters + _FACTORS + operation)
        if operation == _HUE:
            red, green, blue = _shift_hue(red, green, blue, factor)
        else:
            # Towards black, the image's mean grey or each pixel's own.
            grey = tl.where(operation == _CONTRAST, mean, 0.0)
            grey = tl.where(operation == _SATURATION, _grey(red, green, blue), grey)
            grey = (1.0 - factor) * grey
            red, green, blue = _unit(factor * red + grey), _unit(factor * green + grey), _unit(factor * blue + grey)
    return red, green, blue


@triton.jit
def _shift_hue(red, green, blue, turns):
    """As `varscale.data.colour.shift_hue_`."""
    high = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    chroma = high - low
    inverse = 1.0 / tl.maximum(chroma, _CHROMA)
    hue = tl.where(high == green, (blue - red) * inverse + 2.0, (red - green) * inverse + 4.0)
    hue = tl.where(high == red, (green - blue) * inverse, hue) + 6.0 * turns
    hue -= 6.0 * tl.floor(hue * (1 / 6))
    red = low + chroma * _unit(tl.abs(hue - 3.0) - 1.0)
    green = low + chroma * _unit(2.0 - tl.abs(hue - 2.0))
    blue = low + chroma * _unit(2.0 - tl.abs(hue - 4.0))
    return red, green, blue


@triton.jit
def _finish(red, green, blue, parameters, scale, shift, output, pixel, inside):
    if tl.load(parameters + _GRAYSCALE) != 0.0:
        grey = _grey(red, green, blue)
        red, green, blue = grey, grey, grey
    threshold = tl.load(parameters + _SOLARIZE)
    _store(red, threshold, tl.load(scale), tl.load(shift), output + 3 * pixel, inside)
    _store(green, threshold, tl.load(scale + 1), tl.load(shift + 1), output + 3 * pixel + 1, inside)
    _store(blue, threshold, tl.load(scale + 2), tl.load(shift + 2), output + 3 * pixel + 2, inside)


@triton.jit
def _store(value, threshold, scale, shift, place, inside):
    value = tl.where(value >= threshold, 1.0 - value, value)
    tl.store(place, (value * scale + shift).to(place.dtype.element_ty), inside)


@triton.jit
def _grey(red, green, blue):
    return _RED * red + _GREEN * green + _BLUE * blue


@triton.jit
def _unit(value):
    """Clamped to [0, 1]."""
    return tl.minimum(tl.maximum(value, 0.0), 1.0)
