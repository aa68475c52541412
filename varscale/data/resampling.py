"""Antialiased bilinear and bicubic resampling of uint8 images in compiled fixed-point arithmetic.

The filters and the rounding are those of torch's antialiased uint8 `interpolate` (which torchvision's resize calls, and
which follows Pillow's): each output line is a weighted mean of the input lines within the filter's support, stretched
by the scale when shrinking, with weights in 16-bit fixed point; rows and columns one after the other, with 8 bits in
between.
"""

from math import ceil

import numpy as np

from varscale.data.compiled import compiled
from varscale.data.weighted import weighted_sum_of

LANES = 32  # bytes at once along a line
PADDING = 4  # pixels are read two and two and as four bytes, of which the last is the next one's

_sum_of_many, _sum_of_one = weighted_sum_of(LANES), weighted_sum_of(1)
_sum_of_pixels = weighted_sum_of(4, in_pairs=True)


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
    if flip:
        starts, taps, weights, bits = column_weights
        column_weights = starts[::-1].copy(), taps, weights[::-1].copy(), bits
    # The cubic filter overshoots and the 8 bits in between clip it, so that the order of the passes shows: columns
    # first, as torch does. The triangle never clips: rows first leaves less to the slower pass, over pixels.
    if bicubic:
        _columns_first(box, row_weights, column_weights, output)
    else:
        _rows_first(box, row_weights, column_weights, output)


@compiled
def _rows_first(box, row_weights, column_weights, output):
    line = np.empty(box.shape[1] + PADDING, np.uint8)
    narrow = np.empty(output.shape[1] + PADDING, np.uint8)
    for row in range(output.shape[0]):
        _vertical(box, row_weights, row, line)
        _horizontal(line, column_weights, narrow)
        _copy(narrow, output[row], output.shape[1])


@compiled
def _columns_first(box, row_weights, column_weights, output):
    starts, taps = row_weights[0], row_weights[1]
    above, below = starts[0], starts[-1] + taps
    line = np.empty(box.shape[1] + PADDING, np.uint8)
    narrowed = np.empty((below, output.shape[1] + PADDING), np.uint8)
    for row in range(above, below):
        _copy(box[row], line, box.shape[1])
        _horizontal(line, column_weights, narrowed[row])
    for row in range(output.shape[0]):
        _vertical(narrowed[:, : output.shape[1]], row_weights, row, output[row])


@compiled
def _axis_weights(lines, count, bicubic):
    """Weights of `count` output lines, for lines = (start, length, resized, first) as `resample` takes them.

    Returns the first input line of each output line, from int(start) on, (count,); how many input lines each takes, the
    same number for all, or a loop over them would be mispredicted; their weights, (count, an even number) int16, the
    last of which may be one too many and 0; the weights' number of fractional bits.
    """
    start_line, length, resized, first = lines
    offset = start_line - int(start_line)
    available = ceil(start_line + length) - int(start_line)
    scale = length / resized
    shrinking = 1.0 / max(scale, 1.0)
    support = (2.0 if bicubic else 1.0) / shrinking
    starts = np.empty(count, np.int64)
    widths = np.empty(count, np.int64)
    exact = np.zeros((count, 2 * ceil(support) + 1), np.float64)
    for line in range(count):
        centre = offset + (first + line + 0.5) * scale
        start = max(int(centre - support + 0.5), 0)
        stop = min(int(centre + support + 0.5), available)
        total = 0.0
        for tap in range(stop - start):
            distance = abs((start + tap - centre + 0.5) * shrinking)
            weight = _cubic(distance) if bicubic else max(1.0 - distance, 0.0)
            exact[line, tap] = weight
            total += weight
        for tap in range(stop - start):
            exact[line, tap] /= total
        starts[line], widths[line] = start, stop - start
    largest = exact.max()
    bits = 0
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    taps = min((widths.max() + 1) // 2 * 2, available)
    weights = np.zeros((count, (taps + 1) // 2 * 2), np.int16)
    for line in range(count):
        start = min(starts[line], available - taps)
        for tap in range(widths[line]):
            scaled = exact[line, tap] * (1 << bits)
            weights[line, starts[line] - start + tap] = int(scaled - 0.5 if scaled < 0 else scaled + 0.5)
        starts[line] = start
    return starts, taps, weights, np.int32(bits)


@compiled
def _cubic(distance):
    a = -0.5
    if distance < 1.0:
        return ((a + 2.0) * distance - (a + 3.0)) * distance * distance + 1.0
    if distance < 2.0:
        return (((distance - 5.0) * distance + 8.0) * distance - 4.0) * a
    return 0.0


@compiled
def _vertical(box, weights, row, line):
    """One output row over all columns of `box`."""
    starts, taps, table, bits = weights
    width, step = box.shape[1], box.strides[0]
    source, to = box.ctypes.data + starts[row] * step, line.ctypes.data
    weights_at = table.ctypes.data + row * table.strides[0]
    column = 0
    while column + LANES <= width:
        _sum_of_many(source + column, step, weights_at, taps, bits, to + column)
        column += LANES
    if width >= LANES:  # the rest, together with some that are done
        _sum_of_many(source + width - LANES, step, weights_at, taps, bits, to + width - LANES)
        return
    for column in range(width):
        _sum_of_one(source + column, step, weights_at, taps, bits, to + column)


@compiled
def _horizontal(line, weights, narrow):
    """One row of pixels from `line`. Both have PADDING bytes more than their pixels."""
    starts, _, table, bits = weights
    source, to, weights_at = line.ctypes.data, narrow.ctypes.data, table.ctypes.data
    for column in range(starts.shape[0]):
        _sum_of_pixels(source + 3 * starts[column], 3, weights_at, table.shape[1], bits, to + 3 * column)
        weights_at += table.strides[0]


@compiled
def _copy(source, destination, count):
    for i in range(count):  # ten times as fast as an assignment of slices
        destination[i] = source[i]
