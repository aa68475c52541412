"""Runs whose transformer blocks are computed twice end with the same bits, under ZeRO and autocast, on two ranks."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

SETTINGS = [
    "data.workers=1",
    "data.image_size=16",
    "encoder={name: vit_ti, patch_size: 8}",
    "batch.global_batch_size=160",
    "batch.gradient_accumulation_steps=2",
    "schedule={epochs: 1, warmup_epochs: 0}",  # 2 steps
    "logging={every_steps: 1, trackers: []}",
    "online_knn.every_epochs=0",
]
CASES = [
    pytest.param("digits-varcon", "zero2", "bfloat16", marks=pytest.mark.slow),
    pytest.param("digits-varcon", "zero3", "bfloat16", marks=pytest.mark.slow),
    pytest.param("digits-vssl", "zero3", "float32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("recipe", "zero", "precision"), CASES)
def test_the_bits_are_the_same(run_ranks, digits, tmp_path, recipe, zero, precision):
    chosen = [f"data.dir={digits}", f"deepspeed.config={zero}", f"compute.precision={precision}"]
    tasks = {
        wanted: [recipe, [*SETTINGS, *chosen, f"encoder.activation_checkpointing={wanted}"], None]
        for wanted in ("true", "false")
    }
    (tmp_path / "runs.json").write_text(json.dumps(tasks))
    run_ranks(Path(__file__).with_name("train_worker.py"), 2, tmp_path)
    (ours, our_lines), (theirs, their_lines) = (_parameters_and_metrics(tmp_path / wanted) for wanted in tasks)
    assert len(our_lines) == 2
    assert our_lines == their_lines
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in theirs)


def _parameters_and_metrics(run: Path) -> tuple[dict, list[dict]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "gradient_norm")
    return load_file(run / "checkpoints" / "latest" / "model.safetensors"), [{k: x[k] for k in kept} for x in lines]
