"""The papers' experiments: every list gives runs that can start, and what becomes of them is tabulated and drawn."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import experiment_measures
import experiment_tables
import made_runs
import pytest
from PIL import Image

from varscale.cluster.submission import Run, Submission
from varscale.config import load_config
from varscale.data.dataset import read_dataset_info
from varscale.engine.checkpoints import write_checkpoint
from varscale.engine.manifest import write_manifest

SCALES = ["digits", "smoke", "cifar10", "cifar", "imagenet"]


def options(**changes):
    given = {"name": "x", "scale": "smoke", "data": None, "seeds": 1, "only": None, "out": Path("runs"), "set": []}
    return argparse.Namespace(**given | changes)


@pytest.mark.parametrize("scale", SCALES)
def test_every_run_of_every_experiment_has_a_valid_configuration_of_its_own(experiment, lists, chosen, scale):
    for name, content in ((name, chosen(name)) for name in lists["experiments"]):
        trials = experiment.plan(content, lists["scales"][scale], options(name=name, scale=scale, seeds=2))
        assert len(trials) >= 4, name
        whole = [json.dumps(trial.config.model_dump(mode="json", exclude={"output_dir"})) for trial in trials]
        assert len(set(whole)) == len(trials), f"{name}: two runs are the same"
        assert len({trial.config.output_dir for trial in trials}) == len(trials)
        assert content.get("baselines_of") in {None, *(trial.label for trial in trials)}


def test_what_an_experiment_says_goes_over_its_scale_and_what_a_person_says_over_both(experiment, lists, chosen):
    scale = lists["scales"]["smoke"]
    trials = experiment.plan(chosen("epochs"), scale, options(set=["optimizer.lr=7"], data=Path("d")))
    assert [trial.config.schedule.epochs for trial in trials] == [1, 2, 4, 8]
    assert {(t.config.optimizer.lr, str(t.config.data.dir), t.config.encoder.stem) for t in trials} == {
        (7.0, "d", "imagenet")
    }


def test_a_scale_overrides_for_one_objective_alone_and_a_run_overrides_that(experiment, lists, chosen):
    scale = lists["scales"]["smoke"]
    of_all = experiment.plan(chosen("compare"), scale, options())
    momenta = {one.label: one.config.objective.teacher_momentum for one in of_all if one.label in scale["of_objective"]}
    assert momenta == {"vssl": 0.999, "byol": 0.999, "mocov3": 0.999}
    (faster,) = experiment.plan(chosen("vssl"), scale, options(only=["teacher momentum 0.97"]))
    assert faster.config.objective.teacher_momentum == 0.97


SHARED = ("data", "encoder", "optimizer", "schedule", "batch", "compute")


@pytest.mark.parametrize("scale", SCALES)
def test_objectives_are_compared_with_one_schedule_and_optimizer(experiment, lists, chosen, scale):
    """A recipe's own would be for its rate: a warm-up that begins above the scale's ruins the first epoch."""
    trials = experiment.plan(chosen("compare"), lists["scales"][scale], options(name="compare", scale=scale))
    own = {"trust_coefficient", "clip_lr"} if scale != "imagenet" else set()  # LARS's, which is not used
    kept = [
        {name: section.model_dump(exclude=own) for name, section in trial.config if name in SHARED} for trial in trials
    ]
    differing = [trial.label for trial, one in zip(trials, kept, strict=True) if one != kept[0]]
    assert not differing


def test_a_cell_is_in_its_unit_and_leaves_out_what_is_no_number():
    assert experiment_tables.cell([50.0, 52.0, None]) == "51.00 ± 12.71"
    assert experiment_tables.cell([0.98765], "") == "0.9877"
    assert experiment_tables.cell([None]) == "-"


def test_a_table_names_encoder_and_epochs_where_they_are_the_same():
    one, other = load_config("digits-varcon", []), load_config("digits-varcon", ["schedule.epochs=3"])
    found = {"a": {"kNN": [50.0]}, "b": {"kNN": [60.0]}}

    def text(*configs):
        return experiment_tables.table("?", found, {"kNN": "%"}, "flowers", list(configs))

    assert "On held-out images of flowers; resnet18, 10 epochs;" in text(one, one)
    assert "resnet18, 3 to 10 epochs;" in text(one, other)


def test_columns_of_several_units_have_a_panel_each(tmp_path):
    found = {"a": {"kNN": [50.0, 60.0], "margin": [0.2, None]}, "b": {"kNN": [60.0], "margin": [None]}}
    experiment_tables.draw("?", found, {"kNN": "%", "margin": ""}, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").height > 600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["temprature"], "unknown experiment 'temprature'"),
        (["temprature"], "nearest: temperature"),
        (["temperature", "--set", "objective.temperature=1"], "the run '0.05' varies it itself; leave that run out by"),
        (["temperature", "--set", "data.dir=data/mine"], "--set data.dir=...: use --data"),
        (
            ["compare", "--data", "nowhere"],
            "nowhere: no data set; python tools/convert_dataset.py --per-class 1000,500",
        ),
        (["epsilon", "--only", "0.02", "0.3"], "--only: no run is called 0.3; choose from 0.0, 0.01, 0.02, 0.05, 0.09"),
        (["epsilon", "--set", "optimizer.lrr=1"], "unknown key 'optimizer.lrr'; nearest: optimizer.lr"),
    ],
)
def test_mistakes_are_told_in_one_line(experiment, capsys, arguments, message):
    assert experiment.main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1


def test_options_of_submit_go_with_submit(experiment, capsys):
    with pytest.raises(SystemExit):
        experiment.main(["epsilon", "--nodes", "2"])
    assert "options of slurm/submit.py go with --submit" in capsys.readouterr().err


def test_its_runs_become_one_job_array(experiment, digits, tmp_path, capfd):
    options = ["--nodes", "1", "--ranks-per-node", "1", "--dry-run"]
    arguments = ["epsilon", "--data", str(digits), "--out", str(tmp_path), "--seeds", "2", "--submit", *options]
    assert experiment.main(arguments) == 0
    shown = capfd.readouterr().out
    assert "#SBATCH --array=0-9%" in shown
    for epsilon in ("0.0", "0.01", "0.02", "0.05", "0.09"):
        for seed in (0, 1):
            assert f"{tmp_path / 'epsilon-smoke'}/{epsilon}-seed{seed}\n" in shown


def test_without_a_name_they_are_listed(experiment, lists, capsys):
    assert experiment.main([]) == 0
    shown = capsys.readouterr().out
    for name, content in lists["experiments"].items():
        assert name in shown
        assert content["question"] in shown


STEPS = 4 * (320 // 128)  # of the smoke scale's epochs of the digits


def finish(trial, digest, knn, linear, step=STEPS):
    """What a run leaves that was trained on data of this digest and measured, at its end or before."""
    run = trial.config.output_dir
    write_manifest(trial.config, {}, digest, world_size=1, device="cpu")
    write_checkpoint(run, step, {}, {"step": step, "epochs_measured": step * 4 // STEPS}, keep=1)
    data = {"dir": "d", "digest": digest}
    records = [("knn", {"top1_k20": knn}), ("linear_cached", {"top1": linear})]
    made_runs.measure(run, step, *(made_runs.record(name, metrics, data=data) for name, metrics in records))


def test_the_table_has_all_runs_of_these_settings_that_were_measured(
    experiment, lists, chosen, measures, digits, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # relative paths belong to where the command is given
    content, scale, digest = chosen("epsilon"), lists["scales"]["smoke"], read_dataset_info(digits).digest
    given = {"name": "epsilon", "out": Path("runs"), "data": digits}
    folder = Path("runs") / "epsilon-smoke"
    trials = {(t.label, t.config.seed): t for t in experiment.plan(content, scale, options(**given, seeds=2))}
    for number, key in enumerate([("0.0", 0), ("0.0", 1), ("0.05", 0)]):
        finish(trials[key], digest, 50.0 + number, 60.0 + number)
    finish(trials["0.02", 0], "digest of other data", 1.0, 1.0)
    finish(trials["0.01", 0], digest, 2.0, 2.0, step=STEPS // 2)
    last = options(**given, only=["0.05"])
    experiment.show("?", measures, experiment.all_measured(content, scale, last, measures), folder)
    rows = [line.split("|")[1:3] for line in (folder / "table.md").read_text().splitlines() if line.startswith("| 0")]
    assert rows == [[" 0.0 (seeds: 2) ", " 50.50 ± 6.35 "], [" 0.05 (seeds: 1) ", " 52.00 "]]
    assert "mean of 1 to 2 seeds" in (folder / "table.md").read_text()
    others = options(**given, set=["optimizer.lr=7"])
    assert experiment.all_measured(content, scale, others, measures) == []
    assert "0.05-seed0" in (folder / "report" / "index.html").read_text()


def test_baselines_stand_below_the_runs_of_the_experiment_that_names_them(
    experiment, lists, chosen, digits, tmp_path, monkeypatch
):
    content, scale = chosen("compare"), lists["scales"]["smoke"]
    measures, digest = experiment.measures_of(content, lists["columns"], "smoke"), read_dataset_info(digits).digest
    given = {"name": "compare", "out": tmp_path, "data": digits, "only": ["varcon", "supcon"]}
    trials = experiment.plan(content, scale, options(**given))
    for number, trial in enumerate(trials):
        finish(trial, digest, 50.0 + number, 60.0 + number)
    asked = []
    monkeypatch.setattr(experiment_measures, "code_of", lambda *arguments: asked.append(arguments) or 0)
    for trial in trials:
        experiment.measure(trial.config.output_dir, measures, baselines=trial.label == measures.baselines_of)
    (arguments,) = asked
    assert str(trials[0].config.output_dir) in arguments
    assert arguments[4:] == ("knn", "linear_cached", "--baselines")

    run, data = trials[0].config.output_dir, {"dir": "d", "digest": digest}
    path = run / "evaluation" / f"step-{STEPS:08d}.json"
    records = json.loads(path.read_text())["results"]
    values = {"untrained": (30.0, 40.0), "pixels": (31.0, 41.0)}
    for model, (knn, linear) in values.items():
        records.append(made_runs.record("knn", {"top1_k20": knn}, model, data=data))
        records.append(made_runs.record("linear_cached", {"top1": linear}, model, data=data))
    made_runs.measure(run, STEPS, *records)
    experiment.show("?", measures, experiment.all_measured(content, scale, options(**given), measures), tmp_path / "x")
    rows = [line for line in (tmp_path / "x" / "table.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| varcon | 50.00 | 60.00 |",
        "| supcon | 51.00 | 61.00 |",
        "| untrained encoder | 30.00 | 40.00 |",
        "| raw pixels | 31.00 | 41.00 |",
    ]


def test_a_run_is_finished_when_its_last_checkpoint_says_so(experiment, lists, chosen, digits, tmp_path):
    given = options(name="epsilon", out=tmp_path, data=digits, set=["online_knn.every_epochs=0"], only=["0.0"])
    (trial,) = experiment.plan(chosen("epsilon"), lists["scales"]["smoke"], given)
    assert not experiment.is_finished(trial.config)
    for step in (STEPS - 1, STEPS):
        finish(trial, read_dataset_info(digits).digest, 50.0, 60.0, step)
        assert experiment.is_finished(trial.config) == (step == STEPS)
    written = trial.config.output_dir / "checkpoints" / f"step-{STEPS:08d}"
    (written / "state.json").write_text("{}")
    assert not experiment.is_finished(trial.config), "damaged: train.py has the one before"


def test_a_batch_split_otherwise_is_another_run(experiment, lists, chosen, digits, tmp_path, capsys):
    """Batch normalisations, and centroids of micro-batches, see other statistics."""
    given = {"name": "epsilon", "out": tmp_path, "data": digits, "only": ["0.0"]}
    scale = lists["scales"]["smoke"]
    (trial,) = experiment.plan(chosen("epsilon"), scale, options(**given))
    finish(trial, read_dataset_info(digits).digest, 50.0, 60.0)
    split = "batch.max_micro_batch_size=8"
    (other,) = experiment.plan(chosen("epsilon"), scale, options(**given, set=[split]))
    assert experiment.is_finished(trial.config)
    assert not experiment.is_finished(other.config)
    arguments = ["epsilon", "--only", "0.0", "--data", str(digits), "--out", str(tmp_path), "--set", split]
    assert experiment.main(arguments) == 2
    told = capsys.readouterr().err
    assert "belongs to a run of another configuration: batch.max_micro_batch_size is None there, 8 now" in told
    assert len(told.splitlines()) == 1


def test_settings_that_fit_only_some_runs_give_a_table_of_these(experiment, lists, chosen, measures, digits, tmp_path):
    content, scale = chosen("compare"), lists["scales"]["smoke"]
    given = options(name="compare", out=tmp_path, data=digits, only=["varcon"], set=["objective.epsilon=0.01"])
    (trial,) = experiment.plan(content, scale, given)
    finish(trial, read_dataset_info(digits).digest, 50.0, 60.0)
    assert experiment.all_measured(content, scale, given, measures) == [trial]


def test_experiments_that_measure_something_else_share_their_runs(experiment, lists, chosen, tmp_path):
    own, other = (
        experiment.plan(chosen(name), lists["scales"]["smoke"], options(name=name, out=tmp_path))
        for name in ("compare", "few-shot")
    )
    assert own == other
    assert {trial.config.output_dir.parent for trial in own} == {tmp_path / "compare-smoke"}


def test_it_waits_for_a_submission_of_its_runs(experiment, digits, tmp_path, capsys):
    folder = tmp_path / "epsilon-smoke"
    place = folder / "slurm" / "20260101-000000"
    place.mkdir(parents=True)
    run = Run("a", folder / "0.02-seed0", place / "0.yaml", 10)
    leader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(place)])
    Submission(place, "local", 1, 1, 3, [run], str(leader.pid)).save()
    arguments = ["epsilon", "--only", "0.02", "--data", str(digits), "--out", str(tmp_path)]
    try:
        assert experiment.main(arguments) == 2
    finally:
        leader.kill()
        leader.wait()
    told = capsys.readouterr().err
    assert f"{folder}: job {leader.pid} is at its runs" in told
    assert len(told.splitlines()) == 1
    assert not (folder / "0.02-seed0").exists()
    experiment.refuse_while_submitted([], folder)  # it has ended
