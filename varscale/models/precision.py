"""What `compute.precision` and `compute.channels_last` are in torch's terms."""

import torch

from varscale.config.schema import ComputeConfig


def autocast(compute: ComputeConfig, device: torch.device | str) -> torch.autocast:
    """The context in which networks run on `device`: parameters and gradients stay float32."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=compute.precision == "bfloat16")


def is_fast_in_bfloat16(device: torch.device | str) -> bool:
    """Whether the device multiplies matrices of bfloat16 in a unit of its own: a CPU does with AMX. Torch's answer is a
    private function; without it, yes."""
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return torch.device(device).type != "cpu" or known is None or known()


def view_format(compute: ComputeConfig) -> tuple[torch.dtype, torch.memory_format]:
    """Of the views a network is given. Autocast would round its first layer's input anyway, and the layout of the input
    decides the layout of every activation."""
    dtype = torch.bfloat16 if compute.precision == "bfloat16" else torch.float32
    return dtype, torch.channels_last if compute.channels_last else torch.contiguous_format
