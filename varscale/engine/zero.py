"""The DeepSpeed engine of a run, and its partitioned state as whole tensors, whatever the ZeRO stage or world size."""

import logging
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from varscale.config import zero_stage
from varscale.engine.phases import in_phase, name_methods

OptimizerState = dict[str, dict[str, Tensor]]  # parameter name -> state name -> tensor of the parameter's shape, or ()


def build_engine(network: nn.Module, optimizer: torch.optim.Optimizer, settings: dict) -> deepspeed.DeepSpeedEngine:
    """Hand network and optimizer to DeepSpeed; rank 0's parameters are broadcast, then partitioned by stage."""
    deepspeed_logger.setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    if dist.get_world_size() == 1 and not zero_stage(settings):
        engine.enable_backward_allreduce = False  # it would copy all gradients into one buffer, and back
    name_methods(engine, forward="forward", backward="backward")
    return engine


def partition_companion(module: nn.Module, settings: dict) -> None:
    """Under ZeRO-3, partition the parameters of a module that is only run forward, as those of the network are.

    From then on its layers gather what they need when it is called, and every rank keeps its part alone: the same part,
    of a parameter of the same size, as of the network's. Unlike there, small parameters are partitioned too.
    """
    if zero_stage(settings) < 3:
        return
    zero = settings["zero_optimization"] | {"stage3_param_persistence_threshold": 0}
    zero.pop("offload_optimizer", None)  # there is none
    deepspeed.initialize(model=module, config=settings | {"zero_optimization": zero})


def local_part(parameter: nn.Parameter) -> Tensor:
    """What this rank keeps of a parameter: its flat part, padded at the end, under ZeRO-3, otherwise all of it."""
    return getattr(parameter, "ds_tensor", parameter)


def drop_whole_copies(module: nn.Module) -> None:
    """Under ZeRO-3, give back what a forward pass gathered, so that no whole copy hides a change of the parts."""
    partitioned = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if partitioned:
        partitioned[0].partition(partitioned)


def finish_changes(module: nn.Module) -> None:
    """After parts of a partitioned module were changed on a GPU: wait until they are.

    DeepSpeed gathers them on a stream of its own, which waits for no other.
    """
    if torch.cuda.is_available() and any(hasattr(parameter, "ds_tensor") for parameter in module.parameters()):
        torch.cuda.current_stream().synchronize()


def partition_group(settings: dict) -> dist.ProcessGroup | None:
    """The ranks over which the ZeRO stage of these settings partitions the optimizer's parameters; None for stage 0."""
    return dist.group.WORLD if zero_stage(settings) else None


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


@in_phase("optimizer")
def step_with_gradient_norm(engine: deepspeed.DeepSpeedEngine, *, refuse_bad: bool = False) -> Tensor:
    """Take the step that ends an accumulation and return the global gradient norm before clipping, on the device.

    Where gradients are not finite it is no number from 0 to infinity. ZeRO's optimizers then leave the parameters alone
    by themselves; under stage 0 they are spoilt, unless `refuse_bad`, which waits for the device to see whether they
    are. The caller must look at the norm, for DeepSpeed goes on silently.
    """
    if engine.zero_optimization():
        engine.step()
        return torch.as_tensor(engine.get_global_grad_norm())
    norm = nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    if refuse_bad and not norm < float("inf"):
        engine.optimizer.zero_grad(set_to_none=True)  # without gradients nothing is changed, only counted
    engine.step()
    return norm


def whole_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the network's state dict on the CPU of rank 0, every parameter whole; on other ranks nothing.

    A collective where ZeRO-3 has partitioned the network; one parameter at a time is gathered.
    """
    whole = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        is_partitioned = hasattr(tensor, "ds_id")
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=None, enabled=is_partitioned):
            if dist.get_rank() == 0:
                whole[name] = _copy(tensor)
    return whole


def optimizer_state(engine: deepspeed.DeepSpeedEngine) -> OptimizerState:
    """A copy of the optimizer's state, whole per parameter, on the CPU of rank 0; on other ranks nothing.

    A collective where a ZeRO stage has partitioned it.
    """
    is_first = dist.get_rank() == 0
    whole: OptimizerState = {}
    for name, p in _trained(engine):
        if not engine.zero_optimization():
            entry = engine.optimizer.state.get(p, {}) if is_first else {}
        else:
            fragment = _fragment(engine, p)
            entry = engine.optimizer.optimizer.state.get(fragment.shard, {})
            entry = {key: _gather(p, fragment, value, engine.device) for key, value in entry.items()}
        if is_first:
            whole[name] = {key: _copy(value) for key, value in entry.items()}
    return whole


def restore_optimizer_state(engine: deepspeed.DeepSpeedEngine, saved: OptimizerState) -> None:
    """Put back what `optimizer_state` returned, on any number of ranks and under any ZeRO stage."""
    if not saved:  # of a run that had not taken a step
        return
    for name, p in _trained(engine):
        if not engine.zero_optimization():
            engine.optimizer.state[p] = {key: _as_beside(p, value) for key, value in saved[name].items()}
            continue
        fragment = _fragment(engine, p)
        state = engine.optimizer.optimizer.state[fragment.shard]
        for key, value in saved[name].items():
            if value.dim() == 0:
                state[key] = value.to(fragment.shard.device, copy=True)
                continue
            partition = state.setdefault(key, torch.zeros_like(fragment.shard))
            if fragment.length:
                part = value.flatten().narrow(0, fragment.start, fragment.length)
                partition.narrow(0, fragment.offset, fragment.length).copy_(part)


class _Fragment(NamedTuple):
    """The part of one parameter that this rank's optimizer holds: `shard[offset:offset + length]` is what stands at
    `start` in the flattened parameter."""

    shard: Tensor
    offset: int
    start: int
    length: int


def _fragment(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter) -> _Fragment:
    optimizer = engine.optimizer
    if hasattr(parameter, "ds_id"):  # ZeRO-3: every parameter is cut into equal parts, the last one padded
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = min(dist.get_rank() * size, parameter.ds_numel)
        return _Fragment(
            optimizer.fp32_partitioned_groups_flat[group], offset, start, min(size, parameter.ds_numel - start)
        )
    group = next(i for i, group in enumerate(optimizer.bit16_groups) if any(p is parameter for p in group))
    shard, mapping = optimizer.single_partition_of_fp32_groups[group], parameter._hp_mapping
    if mapping is None:  # ZeRO-1 and 2 cut the concatenation of a group's parameters: this one lies on other ranks
        return _Fragment(shard, 0, 0, 0)
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    return _Fragment(shard, here.start, there.start, here.numel)


def _gather(parameter: nn.Parameter, fragment: _Fragment, values: object, device: torch.device) -> object:
    """All ranks' parts of one tensor, put together on rank 0; anything else is the same on all ranks."""
    if not torch.is_tensor(values) or not values.dim():
        return values
    shape = getattr(parameter, "ds_shape", parameter.shape)
    whole = torch.zeros(shape.numel(), dtype=values.dtype, device=device)
    part = values.narrow(0, fragment.offset, fragment.length)
    whole.narrow(0, fragment.start, fragment.length).copy_(part)
    dist.reduce(whole, 0)
    return whole.view(shape)


def _trained(engine: deepspeed.DeepSpeedEngine) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _as_beside(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A copy on the parameter's device and, where it has the parameter's shape, in its layout: fused optimizers ask for
    that."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _copy(value: object) -> Tensor:
    return torch.as_tensor(value).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
