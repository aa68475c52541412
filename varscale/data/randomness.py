"""Counter-based random numbers: every draw is a hash of (seed, epoch, sample index, view, draw), whoever computes it.

No generator is carried along, so neither the number of threads or ranks, nor the batch size, nor a restart can change a
number. The hash is a chain of splitmix64 finalisers (Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), for uint64 numpy arrays and, compiled, numba scalars.
"""

import numpy as np
from numba.extending import register_jitable

# Which `draw` numbers belong to whom, so that no two decisions share a number.
GEOMETRIC_DRAWS = 0
PHOTOMETRIC_DRAWS = 1 << 10
OPERATION_DRAWS = 1 << 11
ORDER_DRAW = 1 << 20

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1 = np.uint64(0xBF58476D1CE4E5B9)
_FACTOR_2 = np.uint64(0x94D049BB133111EB)
_27, _30, _31, _40 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(40)
_UNIT = 2.0**-24


@register_jitable
def mix(state):
    """One splitmix64 step, a bijection of uint64. `state`: uint64 array, or scalar in compiled code."""
    state = state + _GOLDEN
    state = (state ^ (state >> _30)) * _FACTOR_1
    state = (state ^ (state >> _27)) * _FACTOR_2
    return state ^ (state >> _31)


@register_jitable
def stream(seed, epoch, sample, view):
    """The key of one view's random numbers. Arguments: uint64 arrays that broadcast, or scalars in compiled code."""
    return mix(mix(mix(mix(seed) ^ epoch) ^ sample) ^ view)


@register_jitable
def uniform(key, draw):
    """Number `draw` of the stream `key`: uniform on [0, 1), a multiple of 2**-24 and so exact in float32."""
    return (mix(key ^ draw) >> _40) * _UNIT


def as_uint64(value: int) -> np.ndarray:
    """A Python integer modulo 2**64 as a (1,) array: numpy wraps arrays silently where it warns for scalars."""
    return np.array([value % (1 << 64)], dtype=np.uint64)
