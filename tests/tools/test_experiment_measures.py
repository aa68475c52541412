"""What is known of an experiment's runs, and what is left to be measured."""

from pathlib import Path

import experiment_measures
import made_runs

from varscale.data.dataset import read_dataset_info


def test_measured_is_what_the_table_shows_on_the_runs_own_data(experiment, measures, tmp_path):
    run = made_runs.make_run(tmp_path / "a")
    assert experiment.not_measured(run, measures) == ["knn", "linear_cached"]
    own = [made_runs.record("knn", {"top1_k5": 70.0}), made_runs.record("linear_cached", {"top1": 80.0})]
    other = made_runs.record("linear_cached", {"top1": 11.0}, data={"dir": "d", "digest": "another"})
    made_runs.measure(run, 12, *own, other)
    assert experiment.results(run, [])["linear_cached"]["metrics"] == {"top1": 80.0}
    assert experiment.not_measured(run, measures) == ["knn"]
    made_runs.measure(run, 12, own[0], other)
    assert experiment.not_measured(run, measures) == ["knn", "linear_cached"]


def test_what_was_measured_otherwise_is_not_what_the_table_shows(experiment, tmp_path):
    run = made_runs.make_run(tmp_path / "a")
    folder, made = {"dir": "cifar10c"}, {"dir": None}
    corrupted = made_runs.record("corruption", {"clean_knn": 50.0}, settings=made)
    made_runs.measure(
        run,
        12,
        corrupted,
        made_runs.record("corruption", {"clean_knn": 11.0}, settings=folder, variant="cifar10c"),
        made_runs.record("knn", {"top1_k20": 1.0}, settings={"k": [20], "temperature": 99.0}),
        made_runs.record("linear_cached", {"top1": 2.0}, precision="bfloat16"),
    )
    assert experiment.results(run, []) == {"corruption": corrupted}
    assert set(experiment.results(run, ["knn.temperature=99.0"])) == {"corruption", "knn"}
    assert experiment.results(run, ["corruption.dir=cifar10c"])["corruption"]["metrics"] == {"clean_knn": 11.0}


def test_a_linear_layer_measured_by_default_is_known(experiment, tmp_path):
    run = made_runs.make_run(tmp_path / "a")
    settings = {"protocol": "cifar", "epochs": 100, "lr": 5.0, "batch_size": 60}  # as linear.py records them
    made_runs.measure(run, 12, made_runs.record("linear", {"top1": 50.0}, settings=settings))
    assert experiment.results(run, [])["linear"]["metrics"] == {"top1": 50.0}
    assert experiment.results(run, ["linear.protocol=imagenet"]) == {}


def test_every_checkpoint_is_measured_where_the_experiment_says_so(experiment, chosen, tmp_path, monkeypatch):
    run, given = made_runs.make_run(tmp_path / "a"), []
    monkeypatch.setattr(experiment_measures, "code_of", lambda *arguments: given.append(arguments) or 0)
    experiment.measure(run, experiment.measures_of(chosen("embedding-epochs"), {}, "smoke"))
    checkpoints = [run / "checkpoints" / f"step-{step:08d}" for step in (8, 12)]
    assert [Path(arguments[3]) for arguments in given] == checkpoints
    assert {arguments[4:] for arguments in given} == {("knn", "embedding_plot")}
    made_runs.measure(run, 12, made_runs.record("knn", {"top1_k20": 70.0}))
    given.clear()
    experiment.measure(run, experiment.measures_of(chosen("embedding-epochs"), {}, "smoke"))
    assert [arguments[4:] for arguments in given] == [("knn", "embedding_plot"), ("embedding_plot",)]


def test_transfer_is_measured_on_other_data_which_the_settings_name(experiment, chosen, digits, tmp_path):
    run, columns = made_runs.make_run(tmp_path / "a"), chosen("transfer")["columns"]
    measures = experiment.Measures(columns, [f"transfer.data={digits}", "transfer.epochs=4"])

    def left_after(digest):
        metrics = {"linear_top1": 60.0, "finetune_top1": 70.0}
        other, settings = {"dir": str(digits), "digest": digest}, {"data": str(digits), "epochs": 4}
        made_runs.measure(run, 12, made_runs.record("transfer", metrics, data=other, settings=settings))
        return experiment.not_measured(run, measures)

    assert left_after("of images that were there before") == ["transfer"]
    assert left_after(read_dataset_info(digits).digest) == []
    assert experiment.not_measured(run, experiment.measures_of(chosen("transfer"), {}, "cifar")) == ["transfer"]
