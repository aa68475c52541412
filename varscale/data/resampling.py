"""Antialiased bilinear and bicubic resampling of uint8 images in compiled fixed-point arithmetic.

The filters and the rounding are those of torch's antialiased uint8 `interpolate` (which torchvision's resize calls, and
which follows Pillow's): each output line is a weighted mean of the input lines within the filter's support, stretched
by the scale when shrinking, with weights in 16-bit fixed point; rows and columns one after the other, with 8 bits in
between.
"""

from math import ceil

import numpy as np

from varscale.data.compiled import compiled

_ONE, _TWO, _THREE = np.uint64(1), np.uint64(2), np.uint64(3)


@compiled
def resample(source, rows, columns, flip, bicubic, destination):
    """Resize a crop of `source` into `destination`.

    source: (H, W, 3) uint8, C-contiguous. destination: (height, width, 3) uint8, C-contiguous, written.
    rows, columns: each (start, length, resized, first): the lines [start, start + length) of the source, which may
        begin and end inside one, are resized to `resized` lines, of which those from `first` on are kept: for a plain
        crop, the destination's size and 0.
    flip: mirror the result left to right. bicubic: the cubic filter (a = -0.5) in place of the triangle.

    Lines outside the crop do not enter the result, as if the crop had been cut out before.
    """
    top, bottom = int(rows[0]), ceil(rows[0] + rows[1])
    left, right = int(columns[0]), ceil(columns[0] + columns[1])
    box = source.reshape(source.shape[0], 3 * source.shape[1])[top:bottom, 3 * left : 3 * right]
    output = destination.reshape(destination.shape[0], 3 * destination.shape[1])
    row_weights = _axis_weights(rows, destination.shape[0], bicubic)
    column_weights = _axis_weights(columns, destination.shape[1], bicubic)
    # The cubic filter overshoots and the 8 bits in between clip it, so that the order of the passes shows: columns
    # first, as torch does. The triangle never clips: rows first leaves less to the pass that does not vectorise.
    if bicubic:
        _columns_first(box, row_weights, column_weights, flip, output)
    else:
        _rows_first(box, row_weights, column_weights, flip, output)


@compiled
def _rows_first(box, row_weights, column_weights, flip, output):
    sums = np.empty(box.shape[1], np.int32)
    line = np.empty(box.shape[1], np.uint8)
    for row in range(output.shape[0]):
        _vertical(box, row_weights, row, sums, line)
        _horizontal(line, column_weights, flip, output[row])


@compiled
def _columns_first(box, row_weights, column_weights, flip, output):
    sums = np.empty(output.shape[1], np.int32)
    starts, counts = row_weights[0], row_weights[1]
    above, below = starts[0], starts[-1] + counts[-1]
    narrowed = np.empty((below, output.shape[1]), np.uint8)
    for row in range(above, below):
        _horizontal(box[row], column_weights, flip, narrowed[row])
    for row in range(output.shape[0]):
        _vertical(narrowed, row_weights, row, sums, output[row])


@compiled
def _axis_weights(lines, count, bicubic):
    """Weights of `count` output lines, for lines = (start, length, resized, first) as `resample` takes them.

    Returns the first input line of each output line, from int(start) on, (count,), how many it takes (count,), their
    weights (count, taps) int32, and the number of fractional bits of the weights.
    """
    start_line, length, resized, first = lines
    offset = start_line - int(start_line)
    available = ceil(start_line + length) - int(start_line)
    scale = length / resized
    stretch = max(scale, 1.0)
    support = (2.0 if bicubic else 1.0) * stretch
    taps = ceil(support) * 2 + 1
    starts = np.empty(count, np.int64)
    counts = np.empty(count, np.int64)
    exact = np.zeros((count, taps), np.float64)
    for line in range(count):
        centre = offset + (first + line + 0.5) * scale
        start = max(int(centre - support + 0.5), 0)
        stop = min(int(centre + support + 0.5), available)
        total = 0.0
        for tap in range(stop - start):
            distance = abs((start + tap - centre + 0.5) / stretch)
            exact[line, tap] = _cubic(distance) if bicubic else max(1.0 - distance, 0.0)
            total += exact[line, tap]
        exact[line] /= total
        starts[line], counts[line] = start, stop - start
    bits = 0
    while bits < 22 and int(0.5 + exact.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    weights = np.empty((count, taps), np.int32)
    for line in range(count):
        for tap in range(taps):
            scaled = exact[line, tap] * (1 << bits)
            weights[line, tap] = int(scaled - 0.5 if scaled < 0 else scaled + 0.5)
    return starts, counts, weights, bits


@compiled
def _cubic(distance):
    a = -0.5
    if distance < 1.0:
        return ((a + 2.0) * distance - (a + 3.0)) * distance * distance + 1.0
    if distance < 2.0:
        return (((distance - 5.0) * distance + 8.0) * distance - 4.0) * a
    return 0.0


@compiled
def _vertical(box, weights, row, sums, line):
    """One output row over all columns. The loops run along contiguous memory in 32 bits so that they vectorise."""
    starts, counts, table, bits = weights
    start = starts[row]
    weight, source = table[row, 0], box[start]
    half, shift = np.int32(1 << (bits - 1)), np.int32(bits)
    for i in range(line.shape[0]):
        sums[i] = half + np.int32(weight * source[i])
    for tap in range(1, counts[row]):
        weight, source = table[row, tap], box[start + tap]
        for i in range(line.shape[0]):
            sums[i] += np.int32(weight * source[i])
    for i in range(line.shape[0]):
        line[i] = _byte(sums[i] >> shift)


@compiled
def _horizontal(line, weights, flip, output):
    """One row of pixels from `line`, in reverse order when flipped."""
    starts, counts, table, bits = weights
    width = starts.shape[0]
    half, shift = np.int32(1 << (bits - 1)), np.int32(bits)
    for column in range(width):
        red, green, blue = half, half, half
        # Unsigned indices spare a check for negative ones: a third of the whole time.
        at = np.uint64(3 * starts[column])
        for tap in range(counts[column]):
            weight = table[column, tap]
            red = np.int32(red + weight * line[at])
            green = np.int32(green + weight * line[at + _ONE])
            blue = np.int32(blue + weight * line[at + _TWO])
            at += _THREE
        to = np.uint64(3 * (width - 1 - column if flip else column))
        output[to] = _byte(red >> shift)
        output[to + _ONE] = _byte(green >> shift)
        output[to + _TWO] = _byte(blue >> shift)


@compiled
def _byte(value):
    return np.uint8(min(max(value, np.int32(0)), np.int32(255)))
