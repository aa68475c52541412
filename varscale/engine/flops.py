"""Floating-point operations of a step, counted from the model itself: a multiply-add is two."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from varscale.config import BatchSizes, Config
from varscale.engine.learners import Learner


def step_flops(config: Config, sizes: BatchSizes, learner: Learner) -> dict[str, int]:
    """Operations of one rank in one optimizer step, by what they are for.

    Convolutions and matrix products only: what norms, activations and augmentation do is bound by memory, not by
    arithmetic. Counted in meta tensors: takes no memory and no time that grows with the model.

    learner: before ZeRO-3 has partitioned it.
    """
    images = sizes.micro_batch_size * sizes.gradient_accumulation_steps
    views = {size: images * count for size, count in config.data.views_by_size.items()}
    flops = {"student": sum(count * training_flops(learner.network, size) for size, count in views.items())}
    if learner.needs_first_pass(sizes.gradient_accumulation_steps):
        flops["first pass"] = sum(count * forward_flops(learner.network, size) for size, count in views.items())
    for name, companion in learner.companions().items():
        flops[name] = images * config.data.views * forward_flops(companion, config.data.image_size)
    return flops | learner.loss_flops(sizes, sum(config.data.views_by_size.values()))


def forward_flops(network: nn.Module, image_size: int) -> int:
    """Operations of a forward pass of one view."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _stand_in(network)(_view(image_size))
    return counter.get_total_flops()


def training_flops(network: nn.Module, image_size: int) -> int:
    """Operations of a forward and a backward pass of one view."""
    with FlopCounterMode(display=False) as counter:
        output = _stand_in(network)(_view(image_size))
        parts = output if isinstance(output, tuple) else (output,)
        sum(part.sum() for part in parts).backward()
    return counter.get_total_flops()


def _stand_in(network: nn.Module) -> nn.Module:
    """A copy without memory, in evaluation mode, where batch norm needs no second sample and no other rank."""
    return copy.deepcopy(network).to("meta").eval()


def _view(image_size: int) -> Tensor:
    return torch.empty(1, 3, image_size, image_size, device="meta")
