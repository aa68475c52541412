"""Antialiased bilinear and bicubic resampling of uint8 images in compiled fixed-point arithmetic.

The filters and the rounding are those of torch's antialiased uint8 `interpolate` (which torchvision's resize calls, and
which follows Pillow's): each output line is a weighted mean of the input lines within the filter's support, stretched
by the scale when shrinking, with weights in 16-bit fixed point; rows and columns one after the other, with 8 bits in
between.
"""

from math import ceil

import numpy as np

from varscale.data.compiled import compiled
from varscale.data.filters import axis_weights
from varscale.data.weighted import BLOCK, LANES, prefetch, transpose, weighted_sum

CACHE_LINE = 64  # bytes


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
    by_row = axis_weights(rows, output.shape[0], False, bicubic)
    by_column = axis_weights(columns, output.shape[1] // 3, flip, bicubic)
    # The cubic filter overshoots and the 8 bits in between clip it, so that the order of the passes shows: columns
    # first, as torch does. The triangle never clips: rows first leaves less to the slower pass, along the rows.
    if bicubic:
        _columns_first(box, by_row, by_column, output)
    else:
        _rows_first(box, by_row, by_column, output)


@compiled
def _rows_first(box, by_row, by_column, output):
    strip, narrow = _strips(box, output)
    if box.shape[1] < LANES:
        box = _widened(box)
    for start in range(0, output.shape[0], LANES):
        stop = min(start + LANES, output.shape[0])
        for row in range(start, stop):
            _vertical(box, by_row, row, strip[row - start])
            _prefetch(output[row])
        _horizontal(strip, by_column, narrow)
        for row in range(start, stop):
            _copy(narrow[row - start], output[row], output.shape[1])


@compiled
def _columns_first(box, by_row, by_column, output):
    starts, taps = by_row[0], by_row[1]
    above, below = starts[0], starts[-1] + taps
    strip, narrow = _strips(box, output)
    narrowed = np.empty((below, narrow.shape[1]), np.uint8)
    for start in range(above, below, LANES):
        stop = min(start + LANES, below)
        for row in range(start, stop):
            _copy(box[row], strip[row - start], box.shape[1])
        _horizontal(strip, by_column, narrow)
        for row in range(start, stop):
            _copy(narrow[row - start], narrowed[row], output.shape[1])
    for row in range(output.shape[0]):
        _vertical(narrowed[:, :], by_row, row, narrow[0])
        _copy(narrow[0], output[row], output.shape[1])


@compiled
def _strips(box, output):
    """Memory for LANES rows of the box and the output; what is read and written behind their ends is not used."""
    width = (max(box.shape[1], LANES) + BLOCK - 1) // BLOCK * BLOCK
    narrow_width = (output.shape[1] + 3 * LANES - 1) // (3 * LANES) * 3 * LANES
    return np.empty((LANES, width), np.uint8), np.empty((LANES, narrow_width), np.uint8)


@compiled
def _widened(box):
    """As many bytes a row as are read at once: nothing behind the image may be."""
    wide = np.empty((box.shape[0], LANES), np.uint8)
    for row in range(box.shape[0]):
        _copy(box[row], wide[row], box.shape[1])
    return wide[:, :]


@compiled
def _vertical(box, by_row, row, line):
    """One output row over all columns of `box`, of which there are at least LANES."""
    starts, taps, table, bits = by_row
    width, step = box.shape[1], box.strides[0]
    source, to = _address(box) + starts[row] * step, _address(line)
    weights = _address(table) + row * table.strides[0]
    for column in range(0, width - LANES, LANES):
        weighted_sum(source + column, step, weights, taps, bits, to + column)
    # The rest, together with some that are done.
    weighted_sum(source + width - LANES, step, weights, taps, bits, to + width - LANES)


@compiled
def _horizontal(strip, by_column, narrow):
    """LANES rows at once, which lie next to each other once the strip is transposed."""
    starts, taps, table, bits = by_column
    upright, upright_narrow = np.empty((strip.shape[1], LANES), np.uint8), np.empty((3 * LANES, LANES), np.uint8)
    for column in range(0, strip.shape[1], BLOCK):
        transpose(_address(strip) + column, strip.strides[0], _address(upright) + column * LANES, LANES)
    weights = _address(table)
    for group in range(0, starts.shape[0], LANES):
        to = _address(upright_narrow)
        for column in range(group, min(group + LANES, starts.shape[0])):
            source = _address(upright) + 3 * LANES * starts[column]
            for channel in range(0, 3 * LANES, LANES):
                weighted_sum(source + channel, 3 * LANES, weights, taps, bits, to + channel)
            to += 3 * LANES
            weights += table.strides[0]
        for column in range(0, 3 * LANES, LANES):
            for half in (0, BLOCK):
                source = _address(upright_narrow) + column * LANES + half
                to = _address(narrow) + half * narrow.strides[0] + 3 * group + column
                transpose(source, LANES, to, narrow.strides[0])


@compiled
def _address(array):
    return np.int64(array.ctypes.data)


@compiled
def _prefetch(line):
    """A batch is too large for the caches: the copy into it would wait for every cache line of its own."""
    for at in range(0, line.shape[0], CACHE_LINE):
        prefetch(_address(line) + at)


@compiled
def _copy(source, destination, count):
    for i in range(count):  # ten times as fast as an assignment of slices
        destination[i] = source[i]
