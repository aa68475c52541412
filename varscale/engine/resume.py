"""What of a run goes into a checkpoint, and how it comes back: on any number of ranks, under any ZeRO stage."""

from pathlib import Path

from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from varscale.config import Config
from varscale.engine.checkpoints import read_part, read_state, write_checkpoint
from varscale.engine.learners import Learner
from varscale.engine.state import TrainState
from varscale.engine.telemetry import Telemetry
from varscale.engine.zero import OptimizerState, optimizer_state, restore_optimizer_state, whole_state_dict
from varscale.errors import UserError

SEPARATOR = "//"  # between a parameter's name and a state's: neither contains it


def save(config: Config, engine: DeepSpeedEngine, learner: Learner, state: TrainState, telemetry: Telemetry) -> None:
    """Gather the state of all ranks and make it the checkpoint of this step. Every rank must call it.

    Where rank 0 cannot write (disk full, permission lost) it says so and training goes on: the older checkpoints are
    untouched, and the next save tries again.
    """
    parts = {"model": whole_state_dict(engine.module), "optimizer": _flatten(optimizer_state(engine))}
    for name, module in learner.companions().items():
        parts[name] = whole_state_dict(module)
    if not telemetry.first:
        return
    try:
        write_checkpoint(config.output_dir, state.step, parts, state.to_dict(), config.checkpoint.keep)
    except OSError as error:
        telemetry.say(f"WARNING: no checkpoint at step {state.step}: {error}")


def restore_modules(checkpoint: Path, learner: Learner) -> None:
    """Load network and companions; do it before DeepSpeed takes the network, which copies its parameters."""
    for part, module in {"model": learner.network, **learner.companions()}.items():
        _load(module, read_part(checkpoint, part), checkpoint / f"{part}.safetensors")


def restore_progress(checkpoint: Path, engine: DeepSpeedEngine) -> TrainState:
    """Load the optimizer's state into the engine and return where the run stood."""
    restore_optimizer_state(engine, _unflatten(read_part(checkpoint, "optimizer")))
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
