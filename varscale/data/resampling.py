"""Antialiased bilinear and bicubic resampling of uint8 images in compiled fixed-point arithmetic.

The filters and the rounding are those of torch's antialiased uint8 `interpolate` (which torchvision's resize calls, and
which follows Pillow's): each output line is a weighted mean of the input lines within the filter's support, stretched
by the scale when shrinking, with weights in 16-bit fixed point; rows and columns one after the other, with 8 bits in
between.
"""

from math import ceil

import numpy as np

from varscale.data.compiled import compiled
from varscale.data.filters import column_weights, row_weights
from varscale.data.weighted import LANES, PIXEL_BYTES, PIXELS, weighted_pixels_of, weighted_rows

_weighted_pixels_by_2, _weighted_pixels_by_4 = weighted_pixels_of(2), weighted_pixels_of(4)


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
    by_row = row_weights(rows, output.shape[0], bicubic)
    by_column = column_weights(columns, output.shape[1] // 3, flip, bicubic)
    # The cubic filter overshoots and the 8 bits in between clip it, so that the order of the passes shows: columns
    # first, as torch does. The triangle never clips: rows first leaves less to the slower pass, over pixels.
    if bicubic:
        _columns_first(box, by_row, by_column, output)
    else:
        _rows_first(box, by_row, by_column, output)


@compiled
def _rows_first(box, by_row, by_column, output):
    if box.shape[1] < LANES:
        box = _widened(box)
    line = np.empty(box.shape[1] + PIXEL_BYTES, np.uint8)
    narrow = np.empty(_narrow_bytes(by_column), np.uint8)
    for row in range(output.shape[0]):
        _vertical(box, by_row, row, line)
        _horizontal(line, by_column, narrow)
        _copy(narrow, output[row], output.shape[1])


@compiled
def _columns_first(box, by_row, by_column, output):
    starts, taps = by_row[0], by_row[1]
    above, below = starts[0], starts[-1] + taps
    line = np.empty(box.shape[1] + PIXEL_BYTES, np.uint8)
    narrowed = np.empty((below, _narrow_bytes(by_column)), np.uint8)
    for row in range(above, below):
        _copy(box[row], line, box.shape[1])
        _horizontal(line, by_column, narrowed[row])
    line = np.empty(narrowed.shape[1], np.uint8)
    for row in range(output.shape[0]):
        _vertical(narrowed[:, :], by_row, row, line)
        _copy(line, output[row], output.shape[1])


@compiled
def _widened(box):
    """As many bytes a row as are read at once: nothing behind the image may be."""
    wide = np.empty((box.shape[0], LANES), np.uint8)
    for row in range(box.shape[0]):
        _copy(box[row], wide[row], box.shape[1])
    return wide[:, :]


@compiled
def _narrow_bytes(by_column):
    """Room for a row of the output, as `_horizontal` writes and `_vertical` reads it."""
    return max(3 * PIXELS * by_column[0].shape[0] + PIXEL_BYTES, LANES)


@compiled
def _vertical(box, by_row, row, line):
    """One output row over all columns of `box`, of which there are at least LANES."""
    starts, taps, table, bits = by_row
    width, step = box.shape[1], box.strides[0]
    source, to = _address(box) + starts[row] * step, _address(line)
    weights = _address(table) + row * table.strides[0]
    for column in range(0, width - LANES, LANES):
        weighted_rows(source + column, step, weights, taps, bits, to + column)
    # The rest, together with some that are done.
    weighted_rows(source + width - LANES, step, weights, taps, bits, to + width - LANES)


@compiled
def _horizontal(line, by_column, narrow):
    """One output row from `line`. Behind the pixels of both there is room for PIXEL_BYTES."""
    starts, taps, table, bits = by_column
    source, to = _address(line), _address(narrow)
    starts_at, weights = _address(starts), _address(table)
    for _ in range(starts.shape[0]):
        if taps == 2:
            _weighted_pixels_by_2(source, starts_at, weights, taps, bits, to)
        else:
            _weighted_pixels_by_4(source, starts_at, weights, taps, bits, to)
        starts_at += starts.strides[0]
        weights += table.strides[0]
        to += 3 * PIXELS


@compiled
def _address(array):
    return np.int64(array.ctypes.data)


@compiled
def _copy(source, destination, count):
    for i in range(count):  # ten times as fast as an assignment of slices
        destination[i] = source[i]
