"""Floating-point operations of a step, counted from the model itself: a multiply-add is two."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from varscale.config import BatchSizes, Config
from varscale.engine.learners import Learner
from varscale.models.encoders import CheckpointedBlocks


def step_flops(config: Config, sizes: BatchSizes, learner: Learner) -> dict[str, int]:
    """Operations of one rank in one optimizer step, by what they are for.

    Convolutions and matrix products only: what norms, activations and augmentation do is bound by memory, not by
    arithmetic. Counted in meta tensors: takes no memory and no time that grows with the model.

    learner: before ZeRO-3 has partitioned it.
    """
    images = sizes.micro_batch_size * sizes.gradient_accumulation_steps
    views = {size: images * count for size, count in config.data.views_by_size.items()}
    flops = {"student": sum(count * training_flops(learner.network, size) for size, count in views.items())}
    if config.encoder.activation_checkpointing:
        flops["recomputation"] = sum(count * recomputed_flops(learner.network, size) for size, count in views.items())
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
    """Operations of a forward and a backward pass of one view, without what activation checkpointing computes twice."""
    stand_in = _stand_in(network)
    for module in stand_in.modules():
        if isinstance(module, CheckpointedBlocks):
            module.enabled = False
    return _training_flops(stand_in, image_size)


def recomputed_flops(network: nn.Module, image_size: int) -> int:
    """Operations that activation checkpointing adds in the backward pass of one view."""
    return _training_flops(_stand_in(network), image_size) - training_flops(network, image_size)


def _training_flops(stand_in: nn.Module, image_size: int) -> int:
    with FlopCounterMode(display=False) as counter:
        output = stand_in(_view(image_size))
        parts = output if isinstance(output, tuple) else (output,)
        sum(part.sum() for part in parts).backward()
    return counter.get_total_flops()


def _stand_in(network: nn.Module) -> nn.Module:
    """A copy without memory, in evaluation mode, where batch norm needs no second sample and no other rank."""
    return copy.deepcopy(network).to("meta").eval()


def _view(image_size: int) -> Tensor:
    return torch.empty(1, 3, image_size, image_size, device="meta")
