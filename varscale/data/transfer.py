"""Copies from the host to a device that the host does not wait for."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on a device; the tensor itself on a CPU. A GPU is sent it from pinned memory, which is used again
    once it has been read: from other memory the host would wait for all that the GPU has yet to do."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
