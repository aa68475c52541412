"""The resampler's inner loops in LLVM's own terms: weighted sums of bytes, transposing and prefetching.

From plain loops numba's compiler carries sums through memory from tap to tap. Here they stay in vector registers.

In the signatures source, weights and destination are addresses. They are int64, as numba adds unsigned and signed
integers as floats.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 32  # bytes at once
BLOCK = 16  # bytes: within such blocks vector instructions move them about fast

_BYTE, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES, _SHORTS, _INTS = (ir.VectorType(of, 8 * LANES // of.width) for of in (_BYTE, _SHORT, _INT))


@intrinsic
def weighted_sum(_, source, step, weights, taps, bits, destination):
    """For compiled code: writes to the LANES bytes at `destination`, for each lane i,

        clamp((half + sum over t < taps of weights[t] source[t step + i]) >> bits, 0, 255), half = 1 << (bits - 1)

    weights: int16, of which the one behind the last must be there and 0 if `taps` is odd. step, taps: int64.
    bits: int32. The sums must fit into 32 bits, and the results, before they are clamped, into 16.

    Two taps at a time, in the form that LLVM knows as one multiply-add of 16-bit pairs where the processor has it.
    """
    address = types.int64
    return types.void(address, types.int64, address, types.int64, types.int32, address), _generate_sum


@intrinsic
def transpose(_, source, step, destination, destination_step):
    """For compiled code: LANES rows of BLOCK bytes become BLOCK rows of LANES bytes. The steps are from row to row."""
    address = types.int64
    return types.void(address, types.int64, address, types.int64), _generate_transpose


@intrinsic
def prefetch(_, destination):
    """For compiled code: has the cache line around `destination` fetched, which will be written to soon."""
    return types.void(types.int64), _generate_prefetch


def _generate_sum(context, builder, _, arguments):
    source, step, weights, taps, bits, destination = arguments
    half = builder.shl(_INT(1), builder.sub(bits, _INT(1)))
    sums = [cgutils.alloca_once_value(builder, _repeated(builder, half)) for _ in range(4)]
    with cgutils.for_range_slice(builder, _LONG(0), taps, _LONG(2), _LONG) as (tap, _):
        here = builder.add(source, builder.mul(tap, step))
        is_last = builder.icmp_signed("==", builder.add(tap, _LONG(1)), taps)
        following = builder.select(is_last, here, builder.add(here, step))  # nothing is read behind the last tap
        first, second = _load(builder, here, _SHORTS), _load(builder, following, _SHORTS)
        pair = _load(builder, builder.add(weights, builder.mul(tap, _LONG(2))), _INT)
        weight = builder.bitcast(_repeated(builder, pair), _SHORTS)
        for number, both in enumerate(_interleaved(builder, first, second)):  # two bytes of the one, two of the other
            _add_products(builder, sums[2 * number], builder.and_(both, _all(_SHORTS, 255)), weight)
            _add_products(builder, sums[2 * number + 1], builder.lshr(both, _all(_SHORTS, 8)), weight)
    results = [builder.ashr(builder.load(total), _repeated(builder, bits)) for total in sums]
    halves = []
    for even, odd in (results[:2], results[2:]):
        odd = builder.shl(odd, _all(_INTS, 16))
        even, odd = (builder.bitcast(result, _SHORTS) for result in (even, odd))
        both = _shuffled(builder, even, odd, [i + i % 2 * _SHORTS.count for i in range(_SHORTS.count)])
        halves.append(builder.bitcast(_clamped(builder, both), _BYTES))
    order = [
        i + half for block in range(0, LANES, BLOCK) for half in (0, LANES) for i in range(block, block + BLOCK, 2)
    ]
    _store(builder, _shuffled(builder, *halves, order), destination)
    return context.get_dummy_value()


def _generate_transpose(context, builder, _, arguments):
    source, step, destination, destination_step = arguments
    places = [builder.add(source, builder.mul(step, _LONG(row))) for row in range(LANES)]
    rows = [_load(builder, place, ir.VectorType(_BYTE, BLOCK)) for place in places]
    rows = [_shuffled(builder, rows[i], rows[i + BLOCK], range(LANES)) for i in range(BLOCK)]
    # Rows i and i + 8 become rows 2 i and 2 i + 1: a byte's row moves up by one bit, as in a perfect shuffle of cards,
    # and its column's highest bit becomes the row's lowest. After four times rows and columns have changed places.
    for _ in range(4):
        pairs = [_interleaved(builder, rows[i], rows[i + BLOCK // 2]) for i in range(BLOCK // 2)]
        rows = [row for pair in pairs for row in pair]
    for i, row in enumerate(rows):
        _store(builder, row, builder.add(destination, builder.mul(destination_step, _LONG(i))))
    return context.get_dummy_value()


def _generate_prefetch(context, builder, _, arguments):
    pointer = _BYTE.as_pointer()
    to_write, locality, data = _INT(1), _INT(2), _INT(1)
    signature = ir.FunctionType(ir.VoidType(), [pointer, _INT, _INT, _INT])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(arguments[0], pointer), to_write, locality, data])
    return context.get_dummy_value()


def _interleaved(builder, first, second):
    """Elements of two vectors in turn: those of the blocks' first halves, and those of their second halves."""
    count = first.type.count
    block = count * BLOCK // LANES
    lower = [start + i + other for start in range(0, count, block) for i in range(block // 2) for other in (0, count)]
    return [_shuffled(builder, first, second, [i + shift for i in lower]) for shift in (0, block // 2)]


def _add_products(builder, total, values, weights):
    """Adds values[2 i] weights[2 i] + values[2 i + 1] weights[2 i + 1] to total[i]."""
    products_type = ir.VectorType(_INT, _SHORTS.count)
    products = builder.mul(builder.sext(values, products_type), builder.sext(weights, products_type))
    even, odd = (_shuffled(builder, products, products, range(i, _SHORTS.count, 2)) for i in (0, 1))
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
