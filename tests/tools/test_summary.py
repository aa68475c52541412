"""The table over several runs and the curves of each."""

import json

import pytest

from varscale.config import load_config
from varscale.engine.checkpoints import write_checkpoint
from varscale.engine.manifest import write_manifest


@pytest.fixture(scope="module")
def summary(tool):
    return tool("summary")


def make_run(folder, recipe, results):
    config = load_config(recipe, [f"output_dir={folder}"])
    write_manifest(config, {}, "digest", world_size=1, device="cpu")
    write_checkpoint(folder, 7, {}, {}, keep=1)
    lines = [{"kind": "train", "step": s, "loss": 3.0 - s, "lr": 0.1} for s in (1, 2)]
    lines.append({"kind": "knn", "step": 2, "top1_k20": 91.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    records = [{"model": m, "evaluator": e, "metrics": metrics} for m, e, metrics in results]
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "step-00000007.json").write_text(json.dumps({"results": records}))
    return folder


def test_one_table_over_runs_and_baselines(summary, tmp_path, capsys):
    varcon = [
        ("trained", "knn", {"top1_k20": 98.9, "top1_k200": 98.7}),
        ("trained", "linear_cached", {"top1": 98.8, "top5": 100.0}),
    ]
    baselines = [("untrained", "knn", {"top1_k20": 93.6}), ("pixels", "knn", {"top1_k20": 97.5})]
    first = make_run(tmp_path / "a", "digits-varcon", varcon + baselines)
    second = make_run(tmp_path / "b", "digits-vssl", [("trained", "knn", {"top1_k20": 96.1})])
    assert summary.main([str(first), str(second)]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert rows[3:7] == [
        ["raw", "pixels,", "32x32", "97.50", "-", "-"],
        ["untrained", "resnet18,", "32x32", "93.60", "-", "-"],
        ["varcon", "resnet18,", "32x32", "98.90", "98.70", "98.80"],
        ["vssl", "resnet18,", "32x32", "96.10", "-", "-"],
    ]
    assert str(first / "checkpoints" / "step-00000007") in out
    assert (first / "plots" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_not_measured_is_named(summary, tmp_path, capsys):
    run = make_run(tmp_path / "a", "digits-varcon", [])
    (run / "evaluation" / "step-00000007.json").unlink()
    assert summary.main([str(run)]) == 2
    assert "not measured yet; python -m varscale.evaluate" in capsys.readouterr().err
