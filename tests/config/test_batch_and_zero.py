"""Batch sizes multiply out or the error shows the arithmetic; DeepSpeed's "auto" values come from the recipe."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from varscale.config import load_config, resolve_batch, resolve_deepspeed, zero_stage
from varscale.config.schema import BatchConfig
from varscale.errors import UserError


@given(micro=st.integers(1, 64), steps=st.integers(1, 8), world=st.integers(1, 16), data=st.data())
def test_what_is_given_and_what_is_worked_out_multiply_to_the_global_batch(micro, steps, world, data):
    given = data.draw(st.sampled_from(["nothing", "micro", "steps", "both", "limit"]))
    keys = {
        "nothing": {},
        "micro": {"micro_batch_size": micro},
        "steps": {"gradient_accumulation_steps": steps},
        "both": {"micro_batch_size": micro, "gradient_accumulation_steps": steps},
        "limit": {"max_micro_batch_size": micro},
    }[given]
    sizes = resolve_batch(BatchConfig(global_batch_size=micro * steps * world, **keys), world)
    assert sizes.micro_batch_size * sizes.gradient_accumulation_steps * world == micro * steps * world
    if given == "limit":
        assert sizes.micro_batch_size <= micro
        assert sizes.gradient_accumulation_steps <= steps
    elif given != "nothing":
        assert (sizes.micro_batch_size, sizes.gradient_accumulation_steps) == (micro, steps)


@pytest.mark.parametrize(
    ("keys", "world", "message"),
    [
        ({"global_batch_size": 100}, 3, "cannot be shared equally by 3 ranks; nearest: 99"),
        (
            {"global_batch_size": 128, "micro_batch_size": 48},
            2,
            "micro_batch_size 48 x gradient_accumulation_steps 1 x world size 2 = 96, but global_batch_size is 128",
        ),
        (
            {"global_batch_size": 128, "micro_batch_size": 32, "gradient_accumulation_steps": 3},
            1,
            "32 x gradient_accumulation_steps 3 x world size 1 = 96",
        ),
        ({"global_batch_size": 128, "micro_batch_size": 64, "max_micro_batch_size": 32}, 1, "max_micro_batch_size 32"),
    ],
)
def test_sizes_that_do_not_multiply_out_show_the_arithmetic(keys, world, message):
    with pytest.raises(UserError, match=message):
        resolve_batch(BatchConfig(**keys), world)


def resolved(*overrides, world=1):
    config = load_config("digits-varcon", ["batch.global_batch_size=128", *overrides])
    return resolve_deepspeed(config, resolve_batch(config.batch, world))


@pytest.mark.parametrize(
    ("name", "stage"), [("zero0", 0), ("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)]
)
def test_every_configuration_that_ships_is_filled_in(name, stage):
    settings = resolved(f"deepspeed.config={name}", "batch.gradient_accumulation_steps=2", "optimizer.clip_grad_norm=5")
    assert '"auto"' not in json.dumps(settings)
    assert zero_stage(settings) == stage
    assert settings["train_batch_size"] == 128
    assert settings["train_micro_batch_size_per_gpu"] == 64
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 5.0
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert settings["communication_data_type"] == "fp32"


def test_float32_turns_autocast_off():
    assert resolved("compute.precision=float32")["torch_autocast"]["enabled"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_batch_size": 64}, "train_batch_size 64, .* against the recipe's 128 x 1"),
        ({"optimizer": {"type": "Adam"}}, "remove the section 'optimizer'"),
        ({"bf16": {"enabled": True}}, "batch-norm"),
        ({"zero_optimization": {"stage": 4}}, "must be 0, 1, 2 or 3"),
        ({"zero_optimization": None}, "zero_optimization must be a section"),
        ({"prescale_gradients": "auto"}, 'prescale_gradients is "auto"'),
    ],
)
def test_a_json_that_works_against_the_recipe_is_refused(tmp_path, change, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **change}))
    with pytest.raises(UserError, match=message):
        resolved(f"deepspeed.config={path}")


@pytest.mark.parametrize(
    ("name", "message"), [("zero33", "nearest: zero3"), ("nowhere/x.json", "there is no file nowhere/x.json")]
)
def test_an_unknown_configuration_is_named(name, message):
    with pytest.raises(UserError, match=message):
        resolved(f"deepspeed.config={name}")


def test_a_json_of_ones_own_works(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"train_batch_size": 128, "bf16": {"enabled": false}, "zero_optimization": {"stage": 1}}')
    assert zero_stage(resolved(f"deepspeed.config={path}")) == 1
    path.write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        resolved(f"deepspeed.config={path}")
