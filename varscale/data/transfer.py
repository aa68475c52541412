"""Copies between host and device that the host does not wait for."""

import torch
from torch import Tensor


class Upload:
    """Copies tensors from the host to a device, on a stream of their own: while the device still computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensor: Tensor) -> Tensor:
        """A CPU tensor on the device; the tensor itself where that is the CPU.

        A GPU is sent it from pinned memory, which is used again once it has been read: from other memory the host would
        wait for all that the GPU has yet to do.
        """
        if self.stream is None:
            return tensor
        with torch.cuda.stream(self.stream):
            copy = tensor.pin_memory().to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        copy.record_stream(computing)
        return copy


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """As `Upload`, in the stream that computes: for what was drawn on the host a moment ago."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """The values that a tensor has now, on their way to the host: only who reads them waits, and for them alone."""

    def __init__(self, tensor: Tensor) -> None:
        self.values, self.arrived = tensor.detach(), None
        if tensor.device.type == "cuda":
            self.values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.values.copy_(tensor.detach(), non_blocking=True)
            self.arrived = torch.cuda.Event(blocking=True)  # a core that waited busily would be the loader's loss
            self.arrived.record()

    def read(self) -> Tensor:
        """The values, on the CPU."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values
