"""What a run is made of: garbage is collected between steps only, and what is compiled is the same network."""

import gc
import json

import pytest

from varscale.config import load_config, resolve_batch, resolve_deepspeed
from varscale.engine.opening import garbage_left_alone
from varscale.errors import UserError


def test_no_garbage_is_collected_in_a_step_and_all_of_it_afterwards():
    before = gc.get_freeze_count()
    with garbage_left_alone():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > before
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_zero_3_is_not_compiled():
    config = load_config("digits-varcon", ["compute.compile=true", "deepspeed.config=zero3"])
    with pytest.raises(UserError, match=r"compute\.compile is true, but ZeRO stage 3 .*zero0 to zero2"):
        resolve_deepspeed(config, resolve_batch(config.batch, 1))


@pytest.mark.slow  # minutes: C++ is compiled
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("digits-varcon", ["deepspeed.config=zero2"]),
        ("digits-vssl", ["encoder.name=vit_ti", "encoder.stem=null", "encoder.patch_size=8"]),
        ("digits-supcon", ["batch.gradient_accumulation_steps=2", "data.local_views=2", "data.local_size=8"]),
    ],
)
def test_a_compiled_run_is_the_same_but_for_rounding(launch, small_run, tmp_path, recipe, overrides):
    lines = []
    for name in ("false", "true"):
        place = [f"output_dir={tmp_path / name}", f"compute.compile={name}", "schedule.warmup_epochs=0"]
        done = launch("varscale/train.py", "--config", recipe, *small_run, *overrides, *place, timeout=590)
        assert done.returncode == 0, done.stderr
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
    plain, compiled = ([line["loss"] for line in run] for run in lines)
    assert len(plain) == 10
    assert compiled[0] == pytest.approx(
        plain[0], rel=1e-5
    )  # later steps of a batch-normalised network magnify rounding
    assert compiled[:3] == pytest.approx(plain[:3], rel=1e-2)
    assert compiled != plain, "nothing was compiled"
