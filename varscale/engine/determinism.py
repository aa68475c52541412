"""Random numbers and kernels that are the same whenever a step is taken."""

import os

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make torch's random numbers on every device functions of the position, so that no generator need be saved."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def use_deterministic_kernels(wanted: bool) -> None:
    """Have CUDA add in a fixed order, slower; a kernel without such a form raises RuntimeError when it is called.

    Otherwise cuDNN tries its convolutions once for each shape, of which training has few, and takes the fastest.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS asks for
    torch.backends.cudnn.benchmark = not wanted
    torch.use_deterministic_algorithms(wanted)
    # Nothing reads memory before it is written; to fill all of it with NaN first would be one more pass over each map.
    torch.utils.deterministic.fill_uninitialized_memory = False
