"""The weights of antialiased bilinear and bicubic resampling in 16-bit fixed point, as `weighted_sum` takes them.

Plain loops over lines, the taps outside: these the compiler turns into vector code.
"""

from math import ceil

import numpy as np

from varscale.data.compiled import compiled


@compiled
def axis_weights(lines, count, mirrored, bicubic):
    """Weights of `count` output lines, for lines = (start, length, resized, first) as `resample` takes them.

    Returns the first input line of each output line, from int(start) on, (count,); how many input lines each takes;
    their weights, (count, an even number) int16, the last of which may be one too many and 0; the weights' number of
    fractional bits. mirrored: the output begins with its last line.
    """
    starts, weights, bits = _weights(lines, count, bicubic)
    taps = weights.shape[0]
    table = np.zeros((count, (taps + 1) // 2 * 2), np.int16)
    for line in range(count):
        for tap in range(taps):
            table[line, tap] = weights[tap, line]
    if mirrored:
        return starts[::-1].copy(), taps, table[::-1].copy(), bits
    return starts, taps, table, bits


@compiled
def _weights(lines, count, bicubic):
    """First input line of each output line, (count,), weights (taps, count) int16, the number of fractional bits.

    All take the same number of input lines, or a loop over them would be mispredicted. The filters vanish by themselves
    on lines that are too many.
    """
    start_line, length, resized, first = lines
    offset = start_line - int(start_line)
    available = ceil(start_line + length) - int(start_line)
    scale = length / resized
    shrinking = 1.0 / max(scale, 1.0)
    support = (2.0 if bicubic else 1.0) / shrinking
    taps = min(2 * ceil(support), available)
    starts, total, highest = np.empty(count, np.int64), np.zeros(count), np.zeros(count)
    exact = np.empty((taps, count), np.float64)
    for line in range(count):
        centre = offset + (first + line + 0.5) * scale
        starts[line] = min(max(int(centre - support + 0.5), 0), available - taps)
    for tap in range(taps):
        for line in range(count):
            centre = offset + (first + line + 0.5) * scale
            distance = abs((starts[line] + tap - centre + 0.5) * shrinking)
            weight = _cubic(distance) if bicubic else max(1.0 - distance, 0.0)
            exact[tap, line] = weight
            total[line] += weight
    for tap in range(taps):
        for line in range(count):
            exact[tap, line] /= total[line]
            highest[line] = max(highest[line], exact[tap, line])
    largest, bits = highest.max(), 0
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    weights = np.empty((taps, count), np.int16)
    for tap in range(taps):
        for line in range(count):
            scaled = exact[tap, line] * (1 << bits)
            weights[tap, line] = np.int32(scaled - 0.5 if scaled < 0 else scaled + 0.5)
    return starts, weights, np.int32(bits)


@compiled
def _cubic(distance):
    a = -0.5
    if distance < 1.0:
        return ((a + 2.0) * distance - (a + 3.0)) * distance * distance + 1.0
    if distance < 2.0:
        return (((distance - 5.0) * distance + 8.0) * distance - 4.0) * a
    return 0.0
