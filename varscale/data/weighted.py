"""Weighted sums of neighbouring bytes that stay in vector registers: the resampler's inner loops, in LLVM's own terms.

From plain loops numba's compiler makes scalar code where channels are interleaved, and carries sums through memory from
tap to tap. All sums here are

    clamp((half + sum over t < taps of weight[t] byte[t]) >> bits, 0, 255), half = 1 << (bits - 1),

in 32 bits, and two taps at a time, in the form that LLVM knows as one multiply-add of 16-bit pairs where the processor
has it. Before they are clamped the results must fit into 16 bits.

In the signatures source, starts, weights and destination are addresses. They are int64, as numba adds unsigned and
signed integers as floats.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 64  # bytes of a row at once
PIXELS = 4  # of one row at once
PIXEL_BYTES = 16  # that are read to get the RGB of some pixels next to each other

_BYTE, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES, _SHORTS, _INTS = ir.VectorType(_BYTE, 64), ir.VectorType(_SHORT, 32), ir.VectorType(_INT, 16)
_PIXEL, _PAIR = ir.VectorType(_BYTE, PIXEL_BYTES), ir.VectorType(_SHORT, 2)
_BLOCKS = range(0, 64, 16)  # vector instructions move bytes about within blocks of 16


@intrinsic
def weighted_rows(_, source, step, weights, taps, bits, destination):
    """For compiled code: LANES bytes, each the weighted sum of the bytes at source + t step.

    weights: int16, of which the one behind the last must be there and 0 if `taps` is odd. step, taps: int64.
    bits: int32. Nothing is read behind the last tap's LANES bytes.
    """
    address = types.int64
    return types.void(address, types.int64, address, types.int64, types.int32, address), _generate_rows


def weighted_pixels_of(step: int) -> Callable:
    """For compiled code: weighted_pixels(source, starts, weights, taps, bits, destination), PIXELS pixels of 3 bytes.

    Each is the weighted sum of `taps` pixels next to each other. They are taken `step` at a time: 2 or 4.

    starts: (PIXELS,) int64, where the first ones lie, in bytes from source. weights: (taps / 2, PIXELS, 4, 2) int16,
    two taps' weights, four times each. taps: int64, a multiple of `step`. bits: int32. It reads PIXEL_BYTES from the
    first of each `step` pixels on, and writes as many at the destination, of which the last 4 are of no use.
    """

    @intrinsic
    def weighted_pixels(_, source, starts, weights, taps, bits, destination):
        address = types.int64
        signature = types.void(address, address, address, types.int64, types.int32, address)
        return signature, lambda context, builder, _, arguments: _generate_pixels(context, builder, arguments, step)

    return weighted_pixels


def _generate_rows(context, builder, _, arguments):
    source, step, weights, taps, bits, destination = arguments
    sums = [_start(builder, bits) for _ in range(4)]
    with cgutils.for_range_slice(builder, _LONG(0), taps, _LONG(2), _LONG) as (tap, _):
        here = builder.add(source, builder.mul(tap, step))
        is_last = builder.icmp_signed("==", builder.add(tap, _LONG(1)), taps)
        following = builder.select(is_last, here, builder.add(here, step))
        first, second = _load(builder, here, _SHORTS), _load(builder, following, _SHORTS)
        weight = _load(builder, builder.add(weights, builder.mul(tap, _LONG(2))), _PAIR)
        weight = _shuffled(builder, weight, weight, [0, 1] * 16)
        # Two bytes of the one row beside those of the other, from each block's lower and upper half.
        for half in (0, 4):
            order = [block // 2 + half + i + row for block in _BLOCKS for i in range(4) for row in (0, 32)]
            both = _shuffled(builder, first, second, order)
            _add_products(builder, sums[half // 2], builder.and_(both, _all(_SHORTS, 255)), weight)
            _add_products(builder, sums[half // 2 + 1], builder.lshr(both, _all(_SHORTS, 8)), weight)
    results = [_finish(builder, total, bits) for total in sums]
    halves = []
    for even, odd in (results[:2], results[2:]):
        odd = builder.shl(odd, _all(_INTS, 16))
        both = [builder.bitcast(result, _SHORTS) for result in (even, odd)]
        both = _shuffled(builder, *both, [i + 32 * (i % 2) for i in range(32)])
        halves.append(builder.bitcast(_clamped(builder, both), _BYTES))
    order = [block + 2 * i + half for block in _BLOCKS for half in (0, 64) for i in range(8)]
    _store(builder, _shuffled(builder, *halves, order), destination)
    return context.get_dummy_value()


def _generate_pixels(context, builder, arguments, step):
    source, starts, weights, taps, bits, destination = arguments
    total = _start(builder, bits)
    places = [builder.add(source, _load(builder, builder.add(starts, _LONG(8 * i)), _LONG)) for i in range(PIXELS)]
    with cgutils.for_range_slice(builder, _LONG(0), taps, _LONG(step), _LONG) as (tap, _):
        pixels = [_load(builder, builder.add(place, builder.mul(tap, _LONG(3))), _PIXEL) for place in places]
        halves = [_shuffled(builder, *pixels[i : i + 2], range(32)) for i in (0, 2)]
        pixels = _shuffled(builder, *halves, range(64))
        for pair in range(0, step, 2):
            # Of each pixel the channels of two taps, each as a byte and a zero.
            firsts = [block + 3 * pair + channel for block in _BLOCKS for channel in range(4)]
            order = [place for first in firsts for place in (first, 64, first + 3, 64)]
            values = builder.bitcast(_shuffled(builder, pixels, _all(_BYTES, 0), order), _SHORTS)
            weights_at = builder.add(weights, builder.mul(builder.add(tap, _LONG(pair)), _LONG(32)))
            _add_products(builder, total, values, _load(builder, weights_at, _SHORTS))
    results = builder.trunc(_clamped(builder, _finish(builder, total, bits)), _PIXEL)
    order = [4 * pixel + channel for pixel in range(PIXELS) for channel in range(3)] + [0] * PIXELS
    _store(builder, _shuffled(builder, results, results, order), destination)
    return context.get_dummy_value()


def _start(builder, bits):
    half = builder.shl(_INT(1), builder.sub(bits, _INT(1)))
    return cgutils.alloca_once_value(builder, _repeated(builder, half))


def _finish(builder, total, bits):
    return builder.ashr(builder.load(total), _repeated(builder, bits))


def _add_products(builder, total, values, weights):
    """Adds values[2 i] weights[2 i] + values[2 i + 1] weights[2 i + 1] to total[i]."""
    products_type = ir.VectorType(_INT, 32)
    products = builder.mul(builder.sext(values, products_type), builder.sext(weights, products_type))
    even, odd = (_shuffled(builder, products, products, range(start, 32, 2)) for start in (0, 1))
    builder.store(builder.add(builder.load(total), builder.add(even, odd)), total)


def _clamped(builder, values):
    for beyond, limit in (("<", 0), (">", 255)):
        bound = _all(values.type, limit)
        values = builder.select(builder.icmp_signed(beyond, values, bound), bound, values)
    return values


def _all(vector_type, value):
    return ir.Constant(vector_type, [value] * vector_type.count)


def _repeated(builder, value):
    first = builder.insert_element(_all(_INTS, 0), value, _INT(0))
    return _shuffled(builder, first, first, [0] * _INTS.count)


def _shuffled(builder, first, second, order):
    """The elements of two vectors, one behind the other, at the places in `order`."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INT, len(order)), list(order)))


def _load(builder, address, of_type):
    return builder.load(builder.inttoptr(address, of_type.as_pointer()), align=1)


def _store(builder, value, address):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)
