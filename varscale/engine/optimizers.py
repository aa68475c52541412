"""SGD, AdamW and a LARS that stays exact when ZeRO partitions the parameters."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Learned inputs of torchvision's ViT: one vector a position, as a bias is, though they have three dimensions.
_LEARNED_INPUTS = ("class_token", "pos_embedding")


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on each weight is scaled to that weight's norm (arXiv 1708.03888, eq. 6).

        g <- ratio (grad + weight_decay w),   ratio = trust_coefficient ||w|| / (||grad|| + weight_decay ||w||)
        v <- momentum v + g,                  w <- w - lr v

    With `clip_lr` the ratio is min(ratio / lr, 1): lr then bounds the step that the trust coefficient allows, as in
    solo-learn's configurations, where otherwise both are multiplied. The ratio is 1 in groups with `adapt` false and
    for a weight or gradient of norm zero.

    partition_group: the ranks over which ZeRO (stage 1 to 3) partitions every parameter; None where parameters are
        whole. DeepSpeed replaces a group's parameters by this rank's flat shard of them, padded at the end, and steps
        one group at a time. So with partition_group each adapted parameter must be a group of its own: the group's
        shards then are exactly that parameter's, and their squared norms, summed over ranks, the whole parameter's. It
        costs one all-reduce of two numbers per adapted parameter and step.

    Raises ValueError when an adapted group has several parameters under partition_group.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        adapt: bool = True,
        clip_lr: bool = False,
        partition_group: dist.ProcessGroup | None = None,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient, "adapt": adapt})
        self.clip_lr, self.partition_group = clip_lr, partition_group
        for group in self.param_groups:
            if partition_group is not None and group["adapt"] and len(group["params"]) > 1:
                raise ValueError("params: with partition_group each adapted parameter must be a group of its own")
            group["numel"] = sum(parameter.numel() for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        """One update of every parameter that has a gradient; returns the closure's loss where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        adapted = [(p, group) for p, group in entries if group["adapt"]]
        ratios = dict(zip((p for p, _ in adapted), self._trust_ratios(adapted), strict=True))
        alike: dict[tuple[float, float, float], list[nn.Parameter]] = {}
        for parameter, group in entries:
            alike.setdefault((group["lr"], group["momentum"], group["weight_decay"]), []).append(parameter)
        for (lr, momentum, weight_decay), parameters in alike.items():
            updates = torch._foreach_add([p.grad for p in parameters], parameters, alpha=weight_decay)
            for parameter, update in zip(parameters, updates, strict=True):
                if parameter in ratios:
                    update.mul_(ratios[parameter])
            if momentum:
                velocities = [self._velocity(parameter) for parameter in parameters]
                torch._foreach_mul_(velocities, momentum)
                torch._foreach_add_(velocities, updates)
                updates = velocities
            torch._foreach_add_(parameters, updates, alpha=-lr)
        return loss

    def _velocity(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def _trust_ratios(self, adapted: list[tuple[Tensor, dict]]) -> list[Tensor]:
        if not adapted:
            return []
        weights = [self._without_padding(p, group) for p, group in adapted]
        gradients = [self._without_padding(p.grad, group) for p, group in adapted]
        norms = torch.stack(torch._foreach_norm(weights + gradients)).view(2, len(adapted))
        if self.partition_group is not None:
            norms = _sum_over_ranks(norms.square(), self.partition_group).sqrt()
        weight, gradient = norms
        decay, trust = (
            _constants(tuple(group[name] for _, group in adapted), weight.dtype, weight.device)
            for name in ("weight_decay", "trust_coefficient")
        )
        ratios = trust * weight / (gradient + decay * weight)
        if self.clip_lr:
            ratios = torch.stack(torch._foreach_div(list(ratios), [group["lr"] for _, group in adapted])).clamp_(max=1)
        return list(torch.where((weight > 0) & (gradient > 0), ratios, torch.ones_like(ratios)))

    def _without_padding(self, values: Tensor, group: dict) -> Tensor:
        """The part of this rank's shard that belongs to the parameter: stage 3 leaves its padding uninitialised."""
        if self.partition_group is None:
            return values
        shard = values.numel()
        held = group["numel"] - dist.get_rank(self.partition_group) * shard
        return values[: min(max(held, 0), shard)]


@lru_cache(maxsize=8)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept from step to step: to copy them to a GPU is to wait for it."""
    return torch.tensor(values, dtype=dtype, device=device)


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    name: Literal["sgd", "adamw", "lars"],
    lr: float,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    exclude_bias_and_norm: bool = False,
    trust_coefficient: float = 0.001,
    clip_lr: bool = False,
    partition_group: dist.ProcessGroup | None = None,
) -> torch.optim.Optimizer:
    """The optimizer over those of `named_parameters` that need a gradient.

    exclude_bias_and_norm: no weight decay, and no LARS adaptation, for parameters of at most one dimension (biases,
        scales and shifts of normalisation) and for a ViT's class token and position embedding.
    partition_group: for lars under ZeRO stages 1 to 3, the ranks that share the parameters (see `LARS`).
    momentum is for sgd and lars, without Nesterov's form; betas are for adamw; trust_coefficient and clip_lr for lars.

    Call it before DeepSpeed partitions the parameters: their dimensions are needed. Raises ValueError for an
    unknown name, for no parameters, and for parameters already partitioned.
    """
    parameters = {key: p for key, p in named_parameters if p.requires_grad}
    if not parameters:
        raise ValueError("named_parameters: none of them needs a gradient")
    for key, parameter in parameters.items():
        if parameter.numel() == 0:
            raise ValueError(f"named_parameters: {key} is empty; build the optimizer before ZeRO partitions parameters")
    excluded = [p for key, p in parameters.items() if exclude_bias_and_norm and _is_bias_or_norm(key, p)]
    kept = [p for key, p in parameters.items() if not (exclude_bias_and_norm and _is_bias_or_norm(key, p))]
    undecayed = [{"params": excluded, "weight_decay": 0.0}] if excluded else []
    decayed = [{"params": kept}] if kept else []
    if name == "sgd":
        return torch.optim.SGD(decayed + undecayed, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    if name == "adamw":
        return torch.optim.AdamW(decayed + undecayed, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    if name == "lars":
        return LARS(
            [{"params": [p]} for p in kept] + [group | {"adapt": False} for group in undecayed],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            clip_lr=clip_lr,
            partition_group=partition_group,
        )
    raise ValueError(f"name is {name!r}, expected 'sgd', 'adamw' or 'lars'")


def _is_bias_or_norm(name: str, parameter: Tensor) -> bool:
    return parameter.ndim <= 1 or name.rpartition(".")[2] in _LEARNED_INPUTS


def _sum_over_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    # Offloaded parameters are on the CPU, where NCCL cannot reach them.
    on_device = values.cuda() if dist.get_backend(group) == "nccl" else values
    dist.all_reduce(on_device, group=group)
    return on_device.to(values.device)
