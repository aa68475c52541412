"""What of a run goes into a checkpoint, and how it comes back: on any number of ranks, under any ZeRO stage.

A checkpoint is the parameters and buffers of the network and its companions (VSSL's teacher), the optimizer's state,
what the meters hold, and the TrainState. All else is a function of these and the configuration.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from varscale.engine.checkpoints import Tensors, damage, put_aside, read_part, read_state
from varscale.engine.distributed import Ranks
from varscale.engine.learners import Learner
from varscale.engine.meter import Meter
from varscale.engine.state import TrainState
from varscale.engine.zero import OptimizerState, optimizer_state, restore_optimizer_state, whole_state_dict
from varscale.errors import UserError

SEPARATOR = "//"  # between a parameter's name and a state's: neither contains it


def collect(engine: DeepSpeedEngine, learner: Learner, meter: Meter) -> dict[str, Tensors]:
    """Copies of all tensors of a checkpoint, by part, on the CPU of rank 0. A collective."""
    modules = {"model": engine.module, **learner.companions()}
    parts = {name: whole_state_dict(module) for name, module in modules.items()}
    return parts | {"optimizer": _flatten(optimizer_state(engine)), "meter": meter.gather()}


def choose(candidates: Sequence[Path], ranks: Ranks, *, fall_back: bool) -> Path | None:
    """The first of the candidates that is not damaged, the same on every rank; None where there are none.

    Damaged ones are named, and put aside. Raises UserError where all are damaged, and where the first is without
    `fall_back`. A collective.
    """
    found: list[tuple[Path | None, str | None]] = [(None, None)]
    if ranks.is_first:
        found = [_first_good(candidates, fall_back)]
    torch.distributed.broadcast_object_list(found)
    checkpoint, error = found[0]
    if error:
        raise UserError(error)
    if checkpoint and ranks.is_first:
        print(f"going on from {checkpoint}", flush=True)
    return checkpoint


def _first_good(candidates: Sequence[Path], fall_back: bool) -> tuple[Path | None, str | None]:
    for number, checkpoint in enumerate(candidates, start=1):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint, None
        if not fall_back:
            return None, wrong
        if number == len(candidates):
            return None, f"{wrong}; there is no other checkpoint to go on from"
        print(f"WARNING: {wrong}; going on from the checkpoint before it", flush=True)
        with suppress(OSError):  # where nothing may be renamed it is found damaged again next time
            put_aside(checkpoint)
    return None, None


def restore_modules(checkpoint: Path, learner: Learner) -> None:
    """Load network and companions; do it before DeepSpeed takes the network, which copies its parameters."""
    for part, module in {"model": learner.network, **learner.companions()}.items():
        _load(module, read_part(checkpoint, part), checkpoint / f"{part}.safetensors")


def restore_progress(checkpoint: Path, engine: DeepSpeedEngine, meter: Meter, ranks: Ranks) -> TrainState:
    """Load the optimizer's state and the meter, and return where the run stood."""
    restore_optimizer_state(engine, _unflatten(read_part(checkpoint, "optimizer")))
    meter.restore(read_part(checkpoint, "meter"), ranks.rank, ranks.world_size, ranks.device)
    return TrainState.from_dict(read_state(checkpoint)["state"])


def _load(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path}: of another architecture: {name} is {_shape(found.get(name))} there, "
                f"{_shape(expected.get(name))} in this configuration"
            )
    module.load_state_dict(tensors)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {tuple(shape)}"


def _flatten(state: OptimizerState) -> dict[str, Tensor]:
    return {f"{name}{SEPARATOR}{key}": value for name, entry in state.items() for key, value in entry.items()}


def _unflatten(tensors: dict[str, Tensor]) -> OptimizerState:
    state: OptimizerState = {}
    for name, value in tensors.items():
        parameter, _, key = name.partition(SEPARATOR)
        state.setdefault(parameter, {})[key] = value
    return state
