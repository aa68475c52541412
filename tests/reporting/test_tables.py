"""Tables: what differs between runs, who stands beside whom, and published numbers that are those of the recipes."""

import re
from importlib import resources

import pytest
from made_runs import everything, make_run, measure, record

from varscale.config import recipe_names
from varscale.reporting.published import PUBLISHED
from varscale.reporting.runs import read_runs
from varscale.reporting.subjects import subjects
from varscale.reporting.tables import configurations, duration, headlines, metrics, over_checkpoints, published


def rows(table):
    heads = [column.text for column in table.columns]
    return {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in table.rows}


def test_what_differs_and_what_is_the_same(tmp_path):
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", "digits-varcon", "optimizer.lr=0.125")])
    differing, common = configurations(runs)
    assert rows(differing)["optimizer.lr"] == {"a": "0.05", "b": "0.125"}
    assert set(rows(differing)) == {"optimizer.lr", "output_dir"}
    assert rows(common)["objective.epsilon"] == {"all runs": "0.02"}
    alone, everything_in_it = configurations(runs[:1])
    assert alone is None
    assert rows(everything_in_it)["optimizer.lr"] == {"a": "0.05"}


def test_runs_of_different_objectives_share_no_key_of_them(tmp_path):
    differing, _ = configurations(read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", "digits-vssl")]))
    assert rows(differing)["objective.epsilon"] == {"a": "0.02", "b": ""}


def test_a_baseline_stands_once_where_it_is_the_same_and_twice_where_it_is_not(tmp_path):
    runs = [make_run(tmp_path / name) for name in "abc"]
    for run, value in zip(runs, (50.0, 50.0, 51.0), strict=True):
        baseline = record("knn", {"top1_k20": value}, model="untrained")
        measure(run, 12, record("knn", {"top1_k20": 90.0}), baseline)
    table = metrics(subjects(read_runs(runs)))
    name = "untrained resnet18, 32x32, seed 0"
    assert [(column.text, column.kind) for column in table.columns[1:]] == [
        *((run.name, "run") for run in runs),
        (name, "baseline"),
        (f"{name}, c", "baseline"),
    ]
    assert table.rows == [("knn top1_k20 (%)", "90.00", "90.00", "90.00", "50.00", "51.00")]


def test_an_interval_stands_beside_its_mean_and_another_data_set_is_named(tmp_path):
    run = make_run(tmp_path / "a")
    other = record("knn", {"top1_k20": 33.0}, data={"dir": "data/flowers", "digest": "0123456789"})
    measure(run, 12, *everything(12), other)
    (read,) = read_runs([run])
    found = rows(metrics(subjects([read])))
    assert found["few_shot top1_1pct (%) on digits (digest)"] == {"a": "55.00 ± 63.53"}
    assert found["few_shot top1_5shot (%) on digits (digest)"] == {"a": "71.00"}
    assert found["knn top1_k20 (%) on flowers (01234567)"] == {"a": "33.00"}
    assert found["clustering kmeans_ari on digits (digest)"] == {"a": "0.1250"}


def test_published_numbers_are_marked_and_stand_beside_ours(tmp_path):
    run = make_run(tmp_path / "a", "cifar10-vssl")
    measure(run, 12, record("linear", {"top1": 80.0}))
    (read,) = read_runs([run])
    table = published([read], subjects([read]))
    assert [column.kind for column in table.columns] == ["label", "published", "run"]
    label = "byol, resnet18, cifar10, online linear (solo-learn's tables)"
    assert rows(table)[label] == {"published top-1 (%)": "92.58", "ours, linear: a": "80.00"}
    assert any("resnet50" in name for name in rows(table)), "also those of other encoders, by name"
    assert published(read_runs([make_run(tmp_path / "b")]), []) is None, "nothing was published on the digits"


@pytest.mark.parametrize("name", recipe_names())
def test_what_a_recipe_says_was_published_is_in_the_table(name):
    text = resources.files("varscale.recipes").joinpath(f"{name}.yaml").read_text()
    data, _, objective = name.partition("-")
    ours = {one.top1 for one in PUBLISHED if (one.data, one.objective) == (data, objective)}
    stated = {float(number) for number in re.findall(r"Published: ([\d.]+) %", text)}
    assert stated <= ours


def test_checkpoints_stand_beside_each_other(tmp_path):
    run = make_run(tmp_path / "a")
    measure(run, 12, record("knn", {"top1_k20": 90.0}))
    assert over_checkpoints(read_runs([run])[0]) is None
    measure(run, 8, record("knn", {"top1_k20": 70.0}), record("knn", {"top1_k20": 50.0}, model="pixels"))
    table = over_checkpoints(read_runs([run])[0])
    assert rows(table) == {"knn top1_k20 (%)": {"step 8": "70.00", "step 8, pixels": "50.00", "step 12": "90.00"}}


def test_the_table_for_a_terminal_begins_with_the_baselines(tmp_path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", "digits-vssl")
    baselines = [record("knn", {"top1_k20": 93.6}, "untrained"), record("knn", {"top1_k20": 97.5}, "pixels")]
    measure(first, 12, record("knn", {"top1_k20": 98.9}), record("linear_cached", {"top1": 98.8}), *baselines)
    measure(second, 12, record("knn", {"top1_k20": 96.1}))
    lines = headlines(subjects(read_runs([first, second]))).splitlines()
    assert lines[2].split("  ")[-1].strip() == "linear, cached"
    assert [line.rsplit(maxsplit=2) for line in lines[3:]] == [
        ["raw pixels, 32x32", "97.50", "-"],
        ["untrained resnet18, 32x32, seed 0", "93.60", "-"],
        ["a", "98.90", "98.80"],
        ["b", "96.10", "-"],
    ]


def test_durations_are_for_people():
    assert [duration(seconds) for seconds in (5, 89, 120, 3600 * 2 + 61)] == ["5 s", "89 s", "2 min", "2 h 1 min"]
