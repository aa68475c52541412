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
    ("digits-varcon", "zero2", "bfloat16"),
    ("digits-varcon", "zero3", "bfloat16"),
    ("digits-vssl", "zero3", "float32"),
]


@pytest.fixture(scope="module")
def runs(run_ranks, digits, tmp_path_factory) -> Path:
    """The folder with all runs, each made with and without: CASE-true and CASE-false."""
    folder, tasks = tmp_path_factory.mktemp("runs"), {}
    for case in CASES:
        recipe, zero, precision = case
        for wanted in ("true", "false"):
            chosen = [f"deepspeed.config={zero}", f"compute.precision={precision}"]
            overrides = [*SETTINGS, *chosen, f"data.dir={digits}", f"encoder.activation_checkpointing={wanted}"]
            tasks["-".join([*case, wanted])] = [recipe, overrides, None]
    (folder / "runs.json").write_text(json.dumps(tasks))
    run_ranks(Path(__file__).with_name("train_worker.py"), 2, folder, timeout=500)
    return folder


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_bits_are_the_same(runs, case):
    found = [_parameters_and_metrics(runs / "-".join([*case, wanted])) for wanted in ("true", "false")]
    (ours, our_lines), (theirs, their_lines) = found
    assert len(our_lines) == 2
    assert our_lines == their_lines
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in theirs)


def _parameters_and_metrics(run: Path) -> tuple[dict, list[dict]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "gradient_norm")
    return load_file(run / "checkpoints" / "latest" / "model.safetensors"), [{k: x[k] for k in kept} for x in lines]
