"""Exact gradient accumulation for losses that couple all samples of a step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from varscale.engine.learners.base import Forward, MicroBatch, Terms
from varscale.models.norm import frozen_running_statistics


def first_pass(network: nn.Module, forward: Forward, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """The network's output for each micro-batch, without gradient and without a trace in batch norm's statistics."""
    with torch.no_grad(), frozen_running_statistics(network):
        return [forward(*batch.views) for batch in micro_batches]


class StepGradient:
    """The gradient of a step's whole loss, handed out to its micro-batches one after the other (arXiv 2101.06983).

    Micro-batch m then learns from <its outputs, d loss / d outputs of m>: summed over micro-batches that has the
    gradient of the whole loss, as if all outputs had been kept with their graphs. Batch normalisation sees the
    statistics of each micro-batch, in both passes.

    outputs: of each micro-batch, (rows, D), computed without gradient.
    step_loss: from all of them to the loss and its terms. It may speak with other ranks.
    """

    def __init__(self, outputs: Sequence[Tensor], step_loss: Callable[[list[Tensor]], tuple[Tensor, Terms]]) -> None:
        outputs = [output.detach().requires_grad_() for output in outputs]
        with torch.enable_grad():
            loss, self.terms = step_loss(outputs)
        self.value = loss.detach()
        self.gradients = iter(torch.autograd.grad(loss, outputs))
        self.micro_batches = len(outputs)

    def loss(self, outputs: Tensor) -> tuple[Tensor, Terms]:
        """For the next micro-batch's outputs: the value of the whole loss, with this part's gradient, and its terms.

        The engine divides by the number of micro-batches, for which the gradient makes up.
        """
        part = self.micro_batches * (outputs * next(self.gradients)).sum()
        return part - part.detach() + self.value, self.terms
