"""Counter-based random numbers: every draw is a hash of (seed, epoch, sample index, view, draw), whoever computes it.

No generator is carried along, so neither the number of threads or ranks, nor the batch size, nor a restart can change a
number. The hash is a chain of splitmix64 finalisers (Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014). It exists for uint64 (numpy arrays and, compiled, numba scalars) and for int64 torch tensors;
both give the same bits.
"""

import numpy as np
import torch
from numba.extending import register_jitable

# Which `draw` numbers belong to whom, so that no two decisions share a number.
GEOMETRIC_DRAWS = 0
PHOTOMETRIC_DRAWS = 1 << 10
ORDER_DRAW = 1 << 20

_GOLDEN = 0x9E3779B97F4A7C15
_FACTOR_1 = 0xBF58476D1CE4E5B9
_FACTOR_2 = 0x94D049BB133111EB
_UINT64 = 1 << 64

_U_GOLDEN, _U_FACTOR_1, _U_FACTOR_2 = np.uint64(_GOLDEN), np.uint64(_FACTOR_1), np.uint64(_FACTOR_2)
_U_27, _U_30, _U_31, _U_40 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(40)
_UNIT = 2.0**-24


@register_jitable
def mix(state):
    """One splitmix64 step, a bijection of uint64. `state`: uint64 array, or scalar in compiled code."""
    state = state + _U_GOLDEN
    state = (state ^ (state >> _U_30)) * _U_FACTOR_1
    state = (state ^ (state >> _U_27)) * _U_FACTOR_2
    return state ^ (state >> _U_31)


@register_jitable
def stream(seed, epoch, sample, view):
    """The key of one view's random numbers. Arguments: uint64 arrays that broadcast, or scalars in compiled code."""
    return mix(mix(mix(mix(seed) ^ epoch) ^ sample) ^ view)


@register_jitable
def uniform(key, draw):
    """Number `draw` of the stream `key`: uniform on [0, 1), a multiple of 2**-24 and so exact in float32."""
    return (mix(key ^ draw) >> _U_40) * _UNIT


def as_uint64(value: int) -> np.ndarray:
    """A Python integer modulo 2**64 as a (1,) array: numpy wraps arrays silently where it warns for scalars."""
    return np.array([value % _UINT64], dtype=np.uint64)


def torch_stream(seed: int, epoch: int, sample: torch.Tensor, view: int) -> torch.Tensor:
    """`stream` for int64 tensors. `sample`: (N,) int64 on any device. Returns (N,) int64 with the same 64 bits."""
    key = _signed(mix(mix(as_uint64(seed)) ^ as_uint64(epoch)).item())
    return _torch_mix(_torch_mix(sample ^ key) ^ view)


def torch_uniform(key: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """`uniform` for int64 tensors that broadcast: float32 with the same values."""
    return (_shifted(_torch_mix(key ^ draw), 40)).to(torch.float32) * _UNIT


def _torch_mix(state: torch.Tensor) -> torch.Tensor:
    state = state + _signed(_GOLDEN)
    state = (state ^ _shifted(state, 30)) * _signed(_FACTOR_1)
    state = (state ^ _shifted(state, 27)) * _signed(_FACTOR_2)
    return state ^ _shifted(state, 31)


def _shifted(state: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical right shift: int64's own shift drags the sign bit along."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit `value`."""
    return value - _UINT64 if value >= 1 << 63 else value
