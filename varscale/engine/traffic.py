"""What ranks say to each other in a step: predicted, and counted as it is handed to torch.distributed."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from varscale.config import BatchSizes, Config, VarConConfig, zero_stage
from varscale.engine.learners import Learner
from varscale.engine.optimizers import build_optimizer
from varscale.models.norm import SyncBatchNorm
from varscale.objectives.centroids import MAX_DENSE_CLASSES

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


@contextmanager
def counted_traffic() -> Iterator[Counter[str]]:
    """While open, sums up the bytes of the messages of each collective that this process takes part in.

    The message of a reduction is its input and that of a gathering its output, on one rank: a ring sends (W - 1) / W of
    it per rank for all_gather and reduce_scatter, and twice that for all_reduce. Open it before DeepSpeed's
    communication begins, which keeps references to some of these functions. The counter may be cleared at any time.
    """
    counter: Counter[str] = Counter()
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
            counter[name] += _bytes(message)
            inside = True
            try:
                return original(*args, **kwargs)
            finally:
                inside = False

        return call

    for name, original in originals.items():
        setattr(dist, name, counting(name, original))
    try:
        yield counter
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _bytes(message: Tensor | list[Tensor]) -> int:
    tensors = [message] if isinstance(message, Tensor) else message
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Message(NamedTuple):
    """What one rank hands to one kind of collective in an optimizer step, and what for."""

    purpose: str
    collective: str
    bytes: int

    def sent(self, world_size: int) -> float:
        """Bytes that a rank sends in a ring: 2 (W - 1) / W of an all-reduce's message, half of that otherwise."""
        return (2 if self.collective == "all_reduce" else 1) * (world_size - 1) / world_size * self.bytes


def step_traffic(
    config: Config, sizes: BatchSizes, deepspeed: dict, learner: Learner, num_classes: int
) -> list[Message]:
    """The messages of one optimizer step on more than one rank, as the formulas of benchmarks/scaling.md have them.

    They hold for DeepSpeed 0.19.8 with the configurations of ds_configs/, and for networks that stay within
    stage3_max_live_parameters (1e9): above it ZeRO-3 gathers once more for the backward pass. Under ZeRO-3 the first
    pass of exact centroids is an estimate.

    learner: before ZeRO-3 has partitioned it.
    """
    stage, micro = zero_stage(deepspeed), sizes.gradient_accumulation_steps
    trained = [p for p in learner.network.parameters() if p.requires_grad]
    teacher = [p for module in learner.companions().values() for p in module.parameters()]
    first_passes = micro if _has_first_pass(config, sizes) else 0
    groups = _parameter_groups(config, learner)
    adapted = sum(group.get("adapt", False) for group in groups)
    messages = [
        *_parameter_messages(stage, micro, first_passes, trained, teacher, deepspeed),
        Message("gradient norm", "all_reduce", {0: 0, 1: 4, 2: 4, 3: 8}[stage] * len(groups)),
        Message("LARS norms", "all_reduce", 8 * adapted if stage else 0),
        *_batch_norm_messages(micro, first_passes, learner),
    ]
    if isinstance(config.objective, VarConConfig):
        classes = min(num_classes, config.data.views * sizes.global_batch_size)
        exchanges = 1 if first_passes else micro
        rows = num_classes if num_classes <= MAX_DENSE_CLASSES else classes  # at most: those present
        bytes_ = 4 * rows * (config.objective.embedding_dim + 1)
        messages.append(Message("class statistics", "all_reduce", exchanges * bytes_))
    return [message for message in messages if message.bytes]


def _parameter_messages(
    stage: int, micro: int, first_passes: int, trained: Sequence[Tensor], teacher: Sequence[Tensor], deepspeed: dict
) -> list[Message]:
    """Gradients, and parameters where they are partitioned."""
    whole = _size(trained)
    if stage == 3:
        threshold = deepspeed["zero_optimization"].get("stage3_param_persistence_threshold", 100_000)  # DeepSpeed's own
        kept = _size([p for p in trained if p.numel() <= threshold])  # whole on every rank, gathered once a step
        gathered = (micro + 2 * first_passes) * (whole - kept) + kept
        return [
            Message("gradients", "reduce_scatter_tensor", micro * whole),
            Message("parameters", "all_gather_into_tensor", gathered),
            Message("teacher", "all_gather_into_tensor", micro * _size(teacher)),
        ]
    gradients = Message("gradients", "all_reduce", (micro if stage == 2 else 1) * whole)
    return [gradients, *([Message("parameters", "all_gather_into_tensor", whole)] if stage else [])]


def _batch_norm_messages(micro: int, first_passes: int, learner: Learner) -> list[Message]:
    """8 (2C + 1) bytes forward and 16 C backward for each layer of C channels; the teacher has no backward pass."""

    def layers(*modules: nn.Module) -> list[int]:
        return [m.num_features for module in modules for m in module.modules() if isinstance(m, SyncBatchNorm)]

    student, teacher = layers(learner.network), layers(*learner.companions().values())
    forward = sum(8 * (2 * channels + 1) for channels in student)
    total = (micro + first_passes) * forward + micro * sum(16 * channels for channels in student)
    total += micro * sum(8 * (2 * channels + 1) for channels in teacher)
    return [Message("batch norm", "all_reduce", total)]


def _has_first_pass(config: Config, sizes: BatchSizes) -> bool:
    exact = isinstance(config.objective, VarConConfig) and config.objective.centroids == "exact"
    return exact and sizes.gradient_accumulation_steps > 1


def _parameter_groups(config: Config, learner: Learner) -> list[dict]:
    """The optimizer's: ZeRO takes the norm of the gradient group by group, and LARS adapts one parameter a group."""
    options = config.optimizer.model_dump(exclude={"clip_grad_norm"})
    return build_optimizer(learner.network.named_parameters(), **options).param_groups


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
