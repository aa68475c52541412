"""Weighted sums of neighbouring bytes that stay in vector registers: the resampler's inner loop, in LLVM's own terms.

From plain loops numba's compiler makes scalar code where channels are interleaved, and carries sums through memory from
tap to tap.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_BYTE, _SHORT, _INT = ir.IntType(8), ir.IntType(16), ir.IntType(32)


def weighted_sum_of(lanes: int, *, in_pairs: bool = False) -> Callable:
    """For compiled code: weighted_sum(source, step, weights, count, bits, destination), of `lanes` bytes at once.

    It writes to the bytes at `destination`, for each lane i,

        clamp((half + sum over t < count of weights[t] source[t step + i]) >> bits, 0, 255), half = 1 << (bits - 1)

    source, destination, weights: addresses, of uint8, uint8 and int16. step, count: int64. bits: int32. The sums must
    fit into 32 bits.

    Two taps at a time, in the form that LLVM knows as one multiply-add of 16-bit pairs where the processor has it. If
    `count` is odd, the weight behind the last must be there and 0. in_pairs: it is even, which need not be asked.
    """
    one, pair = ir.VectorType(_BYTE, lanes), ir.VectorType(_SHORT, 2)
    sums_type, products_type = ir.VectorType(_INT, lanes), ir.VectorType(_INT, 2 * lanes)

    def places(numbers):
        return ir.Constant(ir.VectorType(_INT, len(numbers)), numbers)

    def generate(context, builder, _, arguments):
        source, step, weights, count, bits, destination = arguments

        def repeated(vector, numbers):
            return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), places(numbers))

        def splat(value):
            first = builder.insert_element(ir.Constant(sums_type, ir.Undefined), value, _INT(0))
            return repeated(first, [0] * lanes)

        def load(address, vector_type):
            return builder.load(builder.inttoptr(address, vector_type.as_pointer()), align=1)

        half = builder.shl(_INT(1), builder.sub(bits, _INT(1)))
        sums = cgutils.alloca_once_value(builder, splat(half))
        with cgutils.for_range_slice(builder, count.type(0), count, count.type(2), count.type) as (tap, _):
            address = builder.add(source, builder.mul(tap, step))
            following = builder.add(address, step)
            if not in_pairs:  # nothing is read behind the last tap
                is_last = builder.icmp_signed("==", builder.add(tap, tap.type(1)), count)
                following = builder.select(is_last, address, following)
            first, second = load(address, one), load(following, one)
            interleaved = [lane + other for lane in range(lanes) for other in (0, lanes)]
            values = builder.zext(builder.shuffle_vector(first, second, places(interleaved)), products_type)
            weight = load(builder.add(weights, builder.mul(tap, tap.type(2))), pair)
            products = builder.mul(values, builder.sext(repeated(weight, [0, 1] * lanes), products_type))
            even, odd = (repeated(products, list(range(start, 2 * lanes, 2))) for start in (0, 1))
            builder.store(builder.add(builder.load(sums), builder.add(even, odd)), sums)
        result = builder.ashr(builder.load(sums), splat(bits))
        for beyond, limit in (("<", 0), (">", 255)):
            bound = splat(_INT(limit))
            result = builder.select(builder.icmp_signed(beyond, result, bound), bound, result)
        builder.store(builder.trunc(result, one), builder.inttoptr(destination, one.as_pointer()), align=1)
        return context.get_dummy_value()

    @intrinsic
    def weighted_sum(_, source, step, weights, count, bits, destination):
        address = types.uintp
        return types.void(address, types.int64, address, types.int64, types.int32, address), generate

    return weighted_sum
