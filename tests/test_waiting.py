"""The loop never waits for the device: while a step is taken the host reads nothing but what became of the last one."""

import json
import subprocess
import sys

import pytest
import torch

RUN = [
    "data.image_size=16",
    "data.workers=1",
    "batch.global_batch_size=32",
    "schedule.epochs=1",
    "schedule.warmup_epochs=0",
    "compute.precision=float32",
    "logging.every_steps=3",
    "online_knn.every_epochs=0",
    "encoder.name=vit_ti",
    "encoder.stem=null",
    "encoder.patch_size=8",
]
WATCHED = (3, 7)  # of 10 steps; metrics are read from the device after steps 3 and 6
OF_A_STEP_BEFORE = {"taken.py:looks_bad", "taken.py:gradient_norm"}
ON_THE_HOST = {
    "base.py:derive",  # what the meter's reading brought
    "base.py:<dictcomp>",  # the same in Python 3.11
    "distributed.py:greatest",  # between hosts
    "heads.py:batch_normalised_mlp",  # a network in meta tensors, whose operations are counted once
    "norm.py:convert_batch_norm",  # likewise
    "centroids.py:require",  # an assertion in the device's own queue, where that is a GPU
}


@pytest.fixture
def places(digits, repository, tmp_path):
    """A function: where a run of these overrides read values of tensors, while `WATCHED` steps were taken."""

    def run(recipe, *overrides):
        arguments = ["--config", recipe, f"data.dir={digits}", f"output_dir={tmp_path / 'run'}", *RUN, *overrides]
        command = [sys.executable, "tests/waiting_run.py", *map(str, WATCHED), tmp_path / "places", *arguments]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "places").read_text())

    return run


@pytest.mark.gpu  # where it watches more, and otherwise everywhere
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("digits-varcon", ["batch.gradient_accumulation_steps=2"]),
        ("digits-vssl", []),
        pytest.param("digits-varcon", ["optimizer.name=lars"], marks=pytest.mark.slow),
        pytest.param("digits-mocov3", ["batch.gradient_accumulation_steps=2"], marks=pytest.mark.slow),
    ],
)
def test_only_finished_steps_are_read(places, recipe, overrides):
    found = places(recipe, *overrides)
    assert set(found) <= OF_A_STEP_BEFORE | ON_THE_HOST
    steps = WATCHED[1] - WATCHED[0] + 1
    assert found.count("taken.py:looks_bad") == steps
    assert found.count("distributed.py:greatest") == 2 * steps  # made, and read after the ranks have spoken


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the watched run ends where it waits")
def test_to_skip_bad_steps_is_to_wait_and_the_watcher_sees_it(places):
    assert "zero.py:step_with_gradient_norm" in places("digits-varcon", "safety.bad_step=skip")
