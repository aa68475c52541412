"""The rows of all ranks on every rank, with the gradient that makes a local mean's average that of the global mean."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from varscale.objectives.centroids import world_size


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all ranks of `group` in their order: (N, ...) -> (W N, ...), with equally many on every rank.

    Differentiable: the backward pass is one reduce-scatter (sum) of the gradient, hence the average over ranks of the
    gradients of local mean losses is the gradient of the global mean.

    Args:
        group: None is the default process group where one is initialised, else this process alone.
    """
    return rows if world_size(group) == 1 else _GatherRows.apply(rows, group)


def first_row(rows: Tensor, group: dist.ProcessGroup | None = None) -> int:
    """The place of this rank's first row among the gathered ones."""
    return 0 if world_size(group) == 1 else dist.get_rank(group) * len(rows)


class _GatherRows(torch.autograd.Function):
    """All ranks' rows; their gradient is the sum over ranks of the gradients, each rank receiving its own rows'."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        everyone = rows.new_empty(world_size(group) * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(everyone, rows.contiguous(), group=group)
        return everyone

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        mine = gradient.new_empty(len(gradient) // world_size(ctx.group), *gradient.shape[1:])
        dist.reduce_scatter_tensor(mine, gradient.contiguous(), group=ctx.group)
        return mine, None
