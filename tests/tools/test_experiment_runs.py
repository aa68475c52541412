"""Experiments as a person starts them: trained, measured and shown, interrupted, stopped by a bad step."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from varscale.engine.rundir import read_manifest


def test_a_run_that_a_bad_step_stopped_is_left_out(experiment, digits, tmp_path, capfd):
    settings = ["data.image_size=16", "data.workers=1", "batch.global_batch_size=64", "safety.loss_limit=1.0e-9"]
    arguments = ["epsilon", "--only", "0.0", "0.02", "--data", str(digits), "--out", str(tmp_path), "--set", *settings]
    assert experiment.main(arguments) == 2
    told = capfd.readouterr().err
    assert told.count("is left out: it was stopped by a bad step") == 2, "the second was begun, too"
    assert told.splitlines()[-1] == "error: no run came to its end: there is nothing to show"


@pytest.mark.slow
def test_an_experiment_is_run_measured_and_shown_and_given_again_only_shown(experiment, digits, tmp_path, capfd):
    settings = ["data.image_size=16", "data.workers=1", "schedule.epochs=1", "compute.precision=float32"]
    settings += ["schedule.warmup_epochs=0", "batch.global_batch_size=64", "online_knn.every_epochs=0"]
    settings += ["objective.latent_dim=16", "objective.projector_hidden=32", "objective.predictor_hidden=32"]
    of_two = ["vssl", "--only", "VSSL", "Euclidean distance"]
    arguments = [*of_two, "--data", str(digits), "--out", str(tmp_path), "--set", *settings]
    assert experiment.main(arguments) == 0
    folder = tmp_path / "vssl-smoke"
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    rows = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == ["", "VSSL", "Euclidean distance"]
    for label, distance, row in zip(("VSSL", "Euclidean distance"), ("cosine", "euclidean"), rows[1:], strict=True):
        run = folder / f"{label.replace(' ', '_')}-seed0"
        assert json.loads((run / "manifest.json").read_text())["config"]["objective"]["distance"] == distance
        found = experiment.results(run, [])
        expected = [found["knn"]["metrics"]["top1_k20"], found["linear_cached"]["metrics"]["top1"]]
        assert row == f"| {label} | " + " | ".join(f"{value:.2f}" for value in expected) + " |"

    def stamps():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.parent.name == "evaluation"}

    before, _ = stamps(), capfd.readouterr()
    assert experiment.main(arguments) == 0
    assert stamps() == before
    shown = capfd.readouterr()
    manifests = [json.loads(path.read_text()) for path in folder.glob("*/manifest.json")]
    assert [len(manifest["starts"]) for manifest in manifests] == [1, 1], "a finished run is not started again"
    assert (folder / "table.md").read_text() in shown.out


@pytest.mark.slow
def test_an_interrupted_experiment_goes_on_and_ends_as_one_that_was_not(repository, experiment, digits, tmp_path):
    settings = ["data.image_size=16", "data.workers=1", "schedule.epochs=4", "compute.precision=float32"]
    settings += ["batch.global_batch_size=64", "online_knn.every_epochs=0", "checkpoint.every_steps=2"]
    arguments = ["terms", "--only", "KL alone", "NLL alone", "--data", str(digits), "--set", *settings, "--out"]
    with open(tmp_path / "said", "wb") as said:
        command = [sys.executable, repository / "tools" / "experiment.py", *arguments, tmp_path / "killed"]
        process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said, start_new_session=True)
    first, second = (tmp_path / "killed" / "terms-smoke" / f"{name}-seed0" for name in ("KL_alone", "NLL_alone"))
    deadline = time.monotonic() + 300
    while not (first / "checkpoints" / "latest").exists():
        assert process.poll() is None, (tmp_path / "said").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not second.exists()

    for place in ("killed", "whole"):
        assert experiment.main([*arguments, str(tmp_path / place)]) == 0
    killed, whole = ((tmp_path / place / "terms-smoke" / "table.md").read_text() for place in ("killed", "whole"))
    assert killed == whole
    assert [len(read_manifest(run)["starts"]) for run in (first, second)] == [2, 1]
