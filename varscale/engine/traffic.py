"""What ranks say to each other in a step: predicted, and counted as it is handed to torch.distributed."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from varscale.config import BatchSizes, Config, zero_stage
from varscale.engine.learners import Learner
from varscale.engine.messages import Message
from varscale.engine.optimizers import build_optimizer
from varscale.models.norm import SyncBatchNorm

# Which argument is the whole message: what every rank holds before a reduction, or after a gathering.
_MESSAGES = {
    "all_reduce": 0,
    "reduce": 0,
    "broadcast": 0,
    "all_gather": 0,
    "all_gather_into_tensor": 0,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "all_to_all_single": 1,
}


class Traffic(NamedTuple):
    """What this process has handed to torch.distributed, by collective."""

    bytes: Counter[str]
    calls: Counter[str]

    def clear(self) -> None:
        self.bytes.clear()
        self.calls.clear()


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """While open, counts the messages of each collective that this process takes part in, and their bytes.

    The message of a reduction is its input and that of a gathering its output, on one rank: a ring sends (W - 1) / W of
    it per rank for all_gather and reduce_scatter, and twice that for all_reduce. Open it before DeepSpeed's
    communication begins, which keeps references to some of these functions. It may be cleared at any time.
    """
    traffic = Traffic(Counter(), Counter())
    originals = {name: getattr(dist, name) for name in _MESSAGES}
    inside = False  # of one collective that is made of another

    def counting(name: str, original: Callable) -> Callable:
        @wraps(original)
        def call(*args: object, **kwargs: object) -> object:
            nonlocal inside
            if inside:
                return original(*args, **kwargs)
            position = _MESSAGES[name]
            message = args[position] if len(args) > position else list(kwargs.values())[position - len(args)]
            traffic.bytes[name] += _bytes(message)
            traffic.calls[name] += 1
            inside = True
            try:
                return original(*args, **kwargs)
            finally:
                inside = False

        return call

    for name, original in originals.items():
        setattr(dist, name, counting(name, original))
    try:
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _bytes(message: Tensor | list[Tensor]) -> int:
    tensors = [message] if isinstance(message, Tensor) else message
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def step_traffic(config: Config, sizes: BatchSizes, deepspeed: dict, learner: Learner) -> list[Message]:
    """The messages of one optimizer step on more than one rank, as the formulas of benchmarks/scaling.md have them.

    They hold for DeepSpeed 0.19.8 with the configurations of ds_configs/, and for networks that stay within
    stage3_max_live_parameters (1e9): above it ZeRO-3 gathers once more for the backward pass. Under ZeRO-3 the first
    pass of exact accumulation is an estimate, and the number of gatherings an upper bound: DeepSpeed joins some.

    learner: before ZeRO-3 has partitioned it.
    """
    stage, micro = zero_stage(deepspeed), sizes.gradient_accumulation_steps
    first_passes = micro if learner.needs_first_pass(micro) else 0
    groups = _parameter_groups(config, learner)
    messages = [
        *_parameter_messages(stage, micro, first_passes, groups, sizes.world_size, learner, deepspeed),
        *_batch_norm_messages(micro, first_passes, learner, len(config.data.views_by_size)),
    ]
    if stage:
        numbers = 2 if stage == 3 else 1
        messages.append(Message("gradient norm", "all_reduce", 4 * numbers * len(groups), len(groups)))
        adapted = sum(group.get("adapt", False) for group in groups)
        messages.append(Message("LARS norms", "all_reduce", 8 * adapted, adapted))
    messages += learner.messages(sizes, sum(config.data.views_by_size.values()))
    return [message for message in messages if message.bytes]


def _parameter_messages(
    stage: int,
    micro: int,
    first_passes: int,
    groups: Sequence[dict],
    world_size: int,
    learner: Learner,
    deepspeed: dict,
) -> list[Message]:
    """Gradients, and parameters where they are partitioned."""
    trained = [p for p in learner.network.parameters() if p.requires_grad]
    teacher = [p for module in learner.companions().values() for p in module.parameters()]
    whole = _size(trained)
    zero = deepspeed.get("zero_optimization", {})
    buckets = math.ceil(whole / (4 * zero.get("reduce_bucket_size", 5e8)))  # DeepSpeed's own default
    if stage == 3:
        threshold = zero.get("stage3_param_persistence_threshold", 100_000)
        large = [p for p in trained if p.numel() > threshold]
        small = [p for p in trained if p.numel() <= threshold]  # whole on every rank, gathered once, one by one
        passes = micro + 2 * first_passes
        gathered, gatherings = passes * _size(large) + _size(small), passes * len(large) + len(small)
        return [
            Message("gradients", "reduce_scatter_tensor", micro * whole, micro * buckets),
            Message("parameters", "all_gather_into_tensor", gathered, gatherings),
            Message("teacher", "all_gather_into_tensor", micro * _size(teacher), micro * len(teacher)),
        ]
    reductions = micro if stage == 2 else 1
    messages = [Message("gradients", "all_reduce", reductions * whole, reductions * buckets)]
    if stage:
        # A group is padded so that every rank's share begins at an even element.
        padded = sum(_size(group["params"]) + -_size(group["params"]) % (4 * 2 * world_size) for group in groups)
        messages.append(Message("parameters", "all_gather_into_tensor", padded, len(groups)))
    return messages


def _batch_norm_messages(micro: int, first_passes: int, learner: Learner, view_sizes: int) -> list[Message]:
    """8 (2C + 1) bytes forward and 16 C backward for each layer of C channels; the teacher has no backward pass.

    The encoder's layers see each size of views by itself; the heads see all views together, the teacher one size.
    """

    def layers(*modules: nn.Module) -> list[int]:
        return [m.num_features for module in modules for m in module.modules() if isinstance(m, SyncBatchNorm)]

    def message(purpose: str, channels: Sequence[int], forward: int, backward: int) -> Message:
        bytes_ = sum(8 * (forward * (2 * c + 1) + backward * 2 * c) for c in channels)
        return Message(purpose, "all_reduce", bytes_, (forward + backward) * len(channels))

    return [
        message(
            "batch norm",
            layers(learner.network) + layers(learner.network.encoder) * (view_sizes - 1),
            micro + first_passes,
            micro,
        ),
        message("teacher's batch norm", layers(*learner.companions().values()), micro, 0),
    ]


def _parameter_groups(config: Config, learner: Learner) -> list[dict]:
    """The optimizer's: ZeRO takes the norm of the gradient group by group, and LARS adapts one parameter a group."""
    options = config.optimizer.model_dump(exclude={"clip_grad_norm"})
    return build_optimizer(learner.network.named_parameters(), **options).param_groups


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
