"""Compiles Triton kernels for GPUs on a machine that has none: what is launched within `compiling` is compiled only."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class Driver:
    """What Triton asks a driver before it launches."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def compiling(architecture: int) -> Iterator[dict[str, list]]:
    """Gives the machine code of what is launched, with CPU tensors in place of a GPU's: name -> compiled kernels."""
    from triton.runtime import JITFunction, driver

    found: dict[str, list] = {}

    def compile_only(kernel, grid):
        def launch(*arguments, **options):
            done = kernel.run(*arguments, grid=grid, warmup=True, **options)
            found.setdefault(kernel.fn.__name__, []).append(done)

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "__getitem__", compile_only)
        patch.setattr(driver, "_active", Driver(architecture))
        yield found
