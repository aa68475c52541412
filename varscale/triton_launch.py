"""Launching Triton kernels: whether this machine can, and not for tensors that have no memory."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

PROBE = 7


@functools.cache
def can_launch() -> bool:
    """Whether there is a GPU on which a Triton kernel writes what it should. Where it does not, says why, once.

    Triton compiles a little C when it is first used, for which it needs a compiler and Python's headers; some clusters'
    nodes have neither.
    """
    if not torch.cuda.is_available():
        return False
    try:
        written = probe("cuda")
    except Exception as error:
        print(
            f"WARNING: Triton's kernels do not run here, torch's slower ones are used: {error!r} (Triton needs a C "
            "compiler and Python.h)",
            file=sys.stderr,
        )
        return False
    return written.item() == PROBE


def probe(device: str) -> torch.Tensor:
    """What a kernel writes: `PROBE`, (1,) int32. Raises whatever keeps it from being compiled or run."""
    import triton
    import triton.language as tl

    @triton.jit
    def write(place, value):
        tl.store(place, value)

    place = torch.zeros(1, dtype=torch.int32, device=device)
    write[(1,)](place, PROBE)
    return place


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """`kernel[grid]`, but nothing is done for a first argument that is a fake tensor, which has no address."""

    def call(first: torch.Tensor, *others: object, **options: object) -> None:
        if not isinstance(first, FakeTensor):
            kernel[grid](first, *others, **options)

    return call
