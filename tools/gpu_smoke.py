#!/usr/bin/env python
"""Whether all that training needs can be imported and its device computes: in a few seconds, before hours are spent.

    python tools/gpu_smoke.py

A table of versions; ends with 1 where something is missing or broken, and says what.
"""

import contextlib
import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PROGRAMS = ("varscale.train", "varscale.engine.opening", "varscale.engine.telemetry", "varscale.evaluate")
PACKAGES = ("pydantic", "numpy", "numba", "torch", "torchvision", "accelerate", "deepspeed")


def main() -> int:
    import varscale  # before torch: it sets how OpenMP waits

    print("| what | version |\n|---|---|")
    checks: dict[str, Callable[[], str]] = {name: lambda name=name: version(name) for name in PACKAGES}
    checks |= {"FFCV's compiled library": ffcv_library, "compiled code": compiled_code, "device": device}
    checks |= {"Triton": triton_kernels}
    checks |= {f"varscale {varscale.__version__}": programs}
    failed = False
    for what, check in checks.items():
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what packages say
                found = check()
        except Exception as error:
            traceback.print_exc()
            failed, found = True, f"FAILED: {error}"
        print(f"| {what} | {found} |", flush=True)
    return int(failed)


def version(name: str) -> str:
    return importlib.import_module(name).__version__


def ffcv_library() -> str:
    from varscale.data.libffcv import imdecode

    if imdecode() is None:
        raise RuntimeError("not installed, or built for other system libraries; torch decodes instead")
    return "decodes"


def compiled_code() -> str:
    """Compiles a function, which an unfit pair of numba and numpy would not."""
    import numba
    import numpy as np

    total = numba.njit(lambda values: values.sum())(np.ones(3))
    return f"numba adds up to {total:g}"


def device() -> str:
    """Its name, once it has multiplied."""
    import torch

    name = "cuda" if torch.cuda.is_available() else "cpu"
    found = (torch.ones(64, 64, dtype=torch.bfloat16, device=name) @ torch.ones(64, 64, device=name).bfloat16())[0, 0]
    if found.item() != 64:
        raise RuntimeError(f"64 ones times 64 ones came to {found.item()}")
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if name == "cuda" else "CPU"


def triton_kernels() -> str:
    """Without a GPU there is nothing to launch one on."""
    import torch

    from varscale.triton_launch import can_launch

    if can_launch():
        return "launches kernels"
    if torch.cuda.is_available():
        raise RuntimeError("launches no kernel (why stands above); torch's slower ones are used instead")
    return "not used"


def programs() -> str:
    for name in PROGRAMS:
        importlib.import_module(name)
    return "imported"


if __name__ == "__main__":
    sys.exit(main())
