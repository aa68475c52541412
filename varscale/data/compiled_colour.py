"""The operations of `varscale.data.colour` for the CPU: one image at a time, row by row, so that all stays in cache.

torch passes over whole images a few dozen times. Here a row goes through all operations before the next one begins;
only the mean grey value that contrast needs takes a pass of its own, and blur one over its columns. A whole policy, its
normalisation included, stays within 1e-4 of torchvision's on the same parameters, but for values so next to
solarisation's threshold that they fall on its other side: fewer than one in 10,000.
"""

import numpy as np

from varscale.data.colour import LUMA, SMALLEST_CHROMA
from varscale.data.compiled import compiled

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
IDENTITY = np.array([1, 1, 1, 0], np.float32)
SMALLEST_TAP = 1e-7  # a blur's weights below this do not show in float32

_RED, _GREEN, _BLUE = (np.float32(weight) for weight in LUMA)
_ZERO, _ONE, _TWO, _THREE, _FOUR, _SIX = (np.float32(value) for value in (0, 1, 2, 3, 4, 6))
_NEXT, _LAST = np.uint64(1), np.uint64(2)
_HALF, _SIXTEEN, _BIT = np.uint32(0x7FFF), np.uint32(16), np.uint32(1)
_CHROMA, _LEVEL = np.float32(SMALLEST_CHROMA), np.float32(1 / 255)


@compiled
def augment_images(images, view, factors, order, grayscale, sigma, solarize, radius, scale, shift, output):
    """Colour jitter, blur, grayscale, solarise and normalise one view of each image; touches no Python object.

    images: (N, V, H, W, 3) uint8. factors: (N, 4) float32, as `varscale.data.colour.jitter_` takes them. order: (N, 4)
    int64, the operation at each place. grayscale: (N,) bool. sigma: (N,) float32 pixels, 0 for no blur. solarize: (N,)
    float32 thresholds. radius: of the blur's kernel. scale, shift: (3,) float32. output: (N, H, W, 3), written: value x
    scale + shift as float32, or as the bits of bfloat16 where it is uint16.
    """
    height, width = images.shape[2], images.shape[3]
    rows = np.empty((3, width), np.float32)
    planes = np.empty((3, height, width), np.float32)
    for n in range(len(images)):
        image = images[n, view]
        mean = _contrast_mean(image, factors[n], order[n], rows)
        blurred = sigma[n] > 0
        if blurred:
            for y in range(height):
                _load(image[y], rows)
                _jitter(rows, factors[n], order[n], 4, mean)
                for channel in range(3):
                    planes[channel, y] = rows[channel]
            weights = _kernel(sigma[n], radius)
            for channel in range(3):
                _blur_rows(planes[channel], weights)
        for y in range(height):
            if blurred:
                for channel in range(3):
                    _blur_column(planes[channel], y, weights, rows[channel])
            else:
                _load(image[y], rows)
                _jitter(rows, factors[n], order[n], 4, mean)
            if grayscale[n]:
                _to_grey(rows)
            _finish(rows, solarize[n], scale, shift, output[n, y])


@compiled
def _load(pixels, rows):
    red, green, blue = rows[0], rows[1], rows[2]
    values = pixels.reshape(-1)
    for x in range(rows.shape[1]):
        at = np.uint64(3 * x)  # unsigned: no check for negative indices, which would halve the speed
        red[x] = np.float32(values[at]) * _LEVEL
        green[x] = np.float32(values[at + _NEXT]) * _LEVEL
        blue[x] = np.float32(values[at + _LAST]) * _LEVEL


@compiled
def _finish(rows, threshold, scale, shift, pixels):
    for channel in range(3):
        row = rows[channel]
        factor, offset = scale[channel], shift[channel]
        for x in range(rows.shape[1]):
            value = row[x]
            value = _ONE - value if value >= threshold else value
            row[x] = value * factor + offset
    values = pixels.reshape(-1)
    if pixels.itemsize == 2:
        bits = rows.view(np.uint32)
        for channel in range(3):
            row = bits[channel]
            for x in range(rows.shape[1]):  # to the nearest, of two equally near to the even one
                row[x] = (row[x] + _HALF + ((row[x] >> _SIXTEEN) & _BIT)) >> _SIXTEEN
        red_bits, green_bits, blue_bits = bits[0], bits[1], bits[2]
        for x in range(rows.shape[1]):
            at = np.uint64(3 * x)
            values[at], values[at + _NEXT], values[at + _LAST] = red_bits[x], green_bits[x], blue_bits[x]
        return
    red, green, blue = rows[0], rows[1], rows[2]
    for x in range(rows.shape[1]):
        at = np.uint64(3 * x)
        values[at], values[at + _NEXT], values[at + _LAST] = red[x], green[x], blue[x]


@compiled
def _contrast_mean(image, factors, order, rows):
    """The mean grey value of the image as contrast finds it; 0 where contrast is not due."""
    if factors[CONTRAST] == _ONE:
        return _ZERO
    before = 0
    while order[before] != CONTRAST:
        before += 1
    height, width = image.shape[0], image.shape[1]
    sums = np.zeros(width, np.float32)
    red, green, blue = rows[0], rows[1], rows[2]
    for y in range(height):
        _load(image[y], rows)
        _jitter(rows, factors, order, before, _ZERO)
        for x in range(width):
            sums[x] += _RED * red[x] + _GREEN * green[x] + _BLUE * blue[x]
    return np.float32(sums.astype(np.float64).sum() / (height * width))


@compiled
def _jitter(rows, factors, order, count, mean):
    """The first `count` operations of an image's order, on one row."""
    red, green, blue = rows[0], rows[1], rows[2]
    for place in range(count):
        operation = order[place]
        factor = factors[operation]
        rest = _ONE - factor
        if factor == IDENTITY[operation]:
            continue
        if operation == HUE:
            _shift_hue(red, green, blue, factor)
        elif operation == SATURATION:
            for x in range(len(red)):
                grey = rest * (_RED * red[x] + _GREEN * green[x] + _BLUE * blue[x])
                red[x] = _unit(factor * red[x] + grey)
                green[x] = _unit(factor * green[x] + grey)
                blue[x] = _unit(factor * blue[x] + grey)
        else:
            offset = rest * mean if operation == CONTRAST else _ZERO
            for channel in range(3):
                row = rows[channel]
                for x in range(len(row)):
                    row[x] = _unit(factor * row[x] + offset)


@compiled
def _shift_hue(red, green, blue, turns):
    sixths = _SIX * turns
    for x in range(len(red)):
        r, g, b = red[x], green[x], blue[x]
        high = r if r > g else g
        high = b if b > high else high
        low = r if r < g else g
        low = b if b < low else low
        chroma = high - low
        inverse = _ONE / (chroma if chroma > _CHROMA else _CHROMA)
        hue = (r - g) * inverse + _FOUR
        hue = (b - r) * inverse + _TWO if high == g else hue
        hue = (g - b) * inverse if high == r else hue
        hue += sixths
        hue -= _SIX * np.floor(hue * (_ONE / _SIX))
        red[x] = low + chroma * _unit(abs(hue - _THREE) - _ONE)
        green[x] = low + chroma * _unit(_TWO - abs(hue - _TWO))
        blue[x] = low + chroma * _unit(_TWO - abs(hue - _FOUR))


@compiled
def _to_grey(rows):
    red, green, blue = rows[0], rows[1], rows[2]
    for x in range(rows.shape[1]):
        grey = _RED * red[x] + _GREEN * green[x] + _BLUE * blue[x]
        red[x], green[x], blue[x] = grey, grey, grey


@compiled
def _kernel(sigma, radius):
    """Half a Gaussian's weights, the middle first: (taps,) float32."""
    exact = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    exact /= 2 * exact.sum() - exact[0]
    taps = 1
    while taps <= radius and exact[taps] > SMALLEST_TAP:
        taps += 1
    return exact[:taps].astype(np.float32)


@compiled
def _blur_rows(plane, weights):
    """Blur along every row, in place, with reflection at the border."""
    radius, width = len(weights) - 1, plane.shape[1]
    padded = np.empty(width + 2 * radius, np.float32)
    for y in range(plane.shape[0]):
        row = plane[y]
        for x in range(width):
            padded[radius + x] = row[x]
        for x in range(radius):
            padded[radius - 1 - x] = row[x + 1]
            padded[radius + width + x] = row[width - 2 - x]
        for x in range(width):
            row[x] = weights[0] * padded[radius + x]
        for tap in range(1, radius + 1):
            weight = weights[tap]
            for x in range(width):
                row[x] += weight * (padded[radius + x - tap] + padded[radius + x + tap])


@compiled
def _blur_column(plane, y, weights, row):
    """One row of the blur along columns, with reflection at the border."""
    last = plane.shape[0] - 1
    middle = plane[y]
    for x in range(len(row)):
        row[x] = weights[0] * middle[x]
    for tap in range(1, len(weights)):
        above, below = plane[abs(y - tap)], plane[last - abs(last - y - tap)]
        weight = weights[tap]
        for x in range(len(row)):
            row[x] += weight * (above[x] + below[x])


@compiled
def _unit(value):
    """Clamped to [0, 1]."""
    value = value if value > _ZERO else _ZERO
    return value if value < _ONE else _ONE
