"""The DeepSpeed configuration of a run: a JSON of ds_configs/, its "auto" values filled in from the recipe."""

import difflib
import json
from pathlib import Path

from varscale.config.batch import BatchSizes
from varscale.config.schema import Config
from varscale.errors import UserError

FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"

# Sections that would work against the recipe, and where the same thing is decided here.
_OURS = {
    "optimizer": "the optimizer is the recipe's `optimizer` section",
    "scheduler": "the learning rate is the recipe's `schedule` section",
    "fp16": "mixed precision is compute.precision=bfloat16 (autocast with float32 parameters)",
    "bf16": "mixed precision is compute.precision=bfloat16: bf16.enabled would cast parameters but not batch-norm "
    "statistics",
}

# DeepSpeed's own throughput timer, on by default, waits for the device twice in every micro-batch; ours never does.
_DEFAULTS = {"timers": {"throughput": {"enabled": False}}}


def resolve_deepspeed(config: Config, sizes: BatchSizes) -> dict:
    """Read `deepspeed.config` (a name or a path) and fill in its "auto" values; UserError names what is wrong."""
    path = _find(config.deepspeed.config)
    settings = _read(path)
    for section, reason in _OURS.items():
        value = settings.get(section)
        if value is not None and not (isinstance(value, dict) and value.get("enabled") is False):
            raise UserError(f"{path}: remove the section {section!r}: {reason}")
    _check_batch(settings, sizes, path)
    filled = _fill(settings, _recipe_values(config, sizes), ())
    if filled.get("zero_optimization", {}).get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3")
    if config.compute.compile and zero_stage(filled) == 3:
        raise UserError(
            f"compute.compile is true, but ZeRO stage 3 ({path}) gathers parameters in hooks that cannot be compiled; "
            "take compute.compile=false, or zero0 to zero2"
        )
    return _DEFAULTS | filled


def zero_stage(settings: dict) -> int:
    """The ZeRO stage of a resolved DeepSpeed configuration."""
    return settings.get("zero_optimization", {}).get("stage", 0)


def _recipe_values(config: Config, sizes: BatchSizes) -> dict[tuple[str, ...], object]:
    return {
        ("train_batch_size",): sizes.global_batch_size,
        ("train_micro_batch_size_per_gpu",): sizes.micro_batch_size,
        ("gradient_accumulation_steps",): sizes.gradient_accumulation_steps,
        ("gradient_clipping",): config.optimizer.clip_grad_norm or 0.0,
        ("torch_autocast", "enabled"): config.compute.precision == "bfloat16",
        ("torch_autocast", "dtype"): "bfloat16",
    }


def _find(name: str) -> Path:
    known = sorted(p.stem for p in FOLDER.glob("*.json"))
    if name in known:
        return FOLDER / f"{name}.json"
    if name.endswith(".json"):
        path = Path(name)
        if path.is_file():
            return path
        raise UserError(f"deepspeed.config: there is no file {name}; names that work: {', '.join(known)}")
    nearest = difflib.get_close_matches(name, known, 1, 0)
    hint = f"; nearest: {nearest[0]}" if nearest else ""
    raise UserError(f"deepspeed.config: {name!r} is not one of {', '.join(known)} nor a path ending in .json{hint}")


def _read(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed.config: cannot read {path}: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"deepspeed.config: {path} holds no JSON object")
    if not isinstance(settings.get("zero_optimization", {}), dict):
        raise UserError(f'deepspeed.config: {path}: zero_optimization must be a section, such as {{"stage": 2}}')
    return settings


def _check_batch(settings: dict, sizes: BatchSizes, path: Path) -> None:
    wanted = {
        "train_batch_size": sizes.global_batch_size,
        "train_micro_batch_size_per_gpu": sizes.micro_batch_size,
        "gradient_accumulation_steps": sizes.gradient_accumulation_steps,
    }
    found = {key: settings.get(key, "auto") for key in wanted}
    triple = {key: wanted[key] if value == "auto" else value for key, value in found.items()}
    if triple != wanted:
        total, micro, steps = triple.values()
        raise UserError(
            f"{path}: train_batch_size {total}, train_micro_batch_size_per_gpu {micro} and gradient_accumulation_steps "
            f"{steps} against the recipe's {sizes.micro_batch_size} x {sizes.gradient_accumulation_steps} x world size "
            f'{sizes.world_size} = {sizes.global_batch_size}; write "auto" and set batch.* in the recipe'
        )


def _fill(value: object, recipe: dict[tuple[str, ...], object], place: tuple[str, ...]) -> object:
    if isinstance(value, dict):
        return {key: _fill(item, recipe, (*place, key)) for key, item in value.items()}
    if value != "auto":
        return value
    if place not in recipe:
        known = ", ".join(".".join(key) for key in recipe)
        raise UserError(f'deepspeed.config: {".".join(place)} is "auto", but the recipe decides only {known}')
    return recipe[place]
