"""Tables: what differs between runs, who stands beside whom, and published numbers that are those of the recipes."""

import re
from importlib import resources

import pytest
from made_runs import everything, make_run, measure, record

from varscale.config import recipe_names
from varscale.reporting.measured import comparisons, embeddings
from varscale.reporting.published import PUBLISHED, data_set
from varscale.reporting.runs import read_runs
from varscale.reporting.subjects import subjects
from varscale.reporting.tables import (
    configurations,
    corruptions,
    duration,
    headlines,
    metrics,
    over_checkpoints,
    over_seeds,
    published,
)


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
    assert found["few_shot top1_1pct (%)"] == {"a": "55.00 ± 63.53"}
    assert found["few_shot top1_5shot (%)"] == {"a": "71.00"}
    assert found["knn top1_k20 (%) on flowers (01234567)"] == {"a": "33.00"}
    assert found["clustering kmeans_ari"] == {"a": "0.1250"}


def test_transfers_to_different_data_have_rows_of_their_own(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run, digest, top1 in zip(runs, ("0123456789", "9876543210"), (61.0, 62.0), strict=True):
        measure(run, 12, record("transfer", {"top1": top1}, data={"dir": "data/flowers", "digest": digest}))
    assert rows(metrics(subjects(read_runs(runs[:1])))) == {"transfer top1 (%) on flowers (01234567)": {"a": "61.00"}}
    assert rows(metrics(subjects(read_runs(runs)))) == {
        "transfer top1 (%) on flowers (01234567)": {"a": "61.00", "b": ""},
        "transfer top1 (%) on flowers (98765432)": {"a": "", "b": "62.00"},
    }


def test_corruptions_of_different_origin_are_kept_apart(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    own = next(one for one in everything(12) if one["evaluator"] == "corruption")
    made, folder = own | {"variant": "made on the fly"}, own | {"variant": "CIFAR-10-C"}
    measure(runs[0], 12, made)
    measure(runs[1], 12, folder)
    found = subjects(read_runs(runs))
    assert rows(metrics(found)) == {
        "corruption (made on the fly) top1_noise (%)": {"a": "44.00", "b": ""},
        "corruption (CIFAR-10-C) top1_noise (%)": {"a": "", "b": "44.00"},
    }
    assert rows(corruptions(found))["fog, knn, CIFAR-10-C"] == {"a": "", "b": "65.50"}
    pictures = comparisons(found)
    assert [one.name for one in pictures] == [
        *("corruption-knn", "corruption-linear", "corruption-knn-2", "corruption-linear-2")
    ]
    assert pictures[2].title.endswith("of corruption, CIFAR-10-C")


CIFAR10 = {"classes": 10, "train": 50_000, "val": 10_000, "source": "cifar10"}
CIFAR100 = CIFAR10 | {"classes": 100, "source": "npz:/tmp/cifar100.npz"}
IMAGENET100 = {"classes": 100, "train": 126_689, "val": 5_000, "source": "imagefolder:/data/in100"}


def on(data: dict) -> dict:
    return {"data": {"dir": "data/x", "digest": "digest"} | data}


def test_published_numbers_are_marked_and_stand_beside_ours(tmp_path):
    run = make_run(tmp_path / "a", "cifar10-vssl")
    measure(run, 12, record("linear", {"top1": 80.0}, **on(CIFAR10)))
    table = published(subjects(read_runs([run])))
    assert [column.kind for column in table.columns] == ["label", "published", "run"]
    label = "byol, resnet18, cifar10, online linear (solo-learn's tables)"
    assert rows(table)[label] == {"published top-1 (%)": "92.58", "ours: a": "80.00"}
    assert any("resnet50" in name for name in rows(table)), "also those of other encoders, by name"
    own = "cross_entropy, resnet50, cifar10, the classifier itself (SupContrast's README)"
    assert rows(table)[own]["ours: a"] == ""
    measure(
        run, 12, record("linear", {"top1": 80.0}, **on(CIFAR10)), record("classifier", {"top1": 79.0}, **on(CIFAR10))
    )
    assert rows(published(subjects(read_runs([run]))))[own]["ours: a"] == "79.00"


def test_published_numbers_stand_beside_none_of_other_data(tmp_path):
    """By what was converted: neither the recipe's name nor the folder's tells."""
    runs = [make_run(tmp_path / name, "imagenet100-varcon", "data.dir=data/imagenet100") for name in "abcd"]
    others = [CIFAR10, CIFAR100, IMAGENET100 | {"train": 126_688}]
    for run, top1, data in zip(runs, (81.0, 72.0, 63.0), others, strict=False):
        measure(run, 12, record("linear", {"top1": top1}, **on(data)))
    table = rows(published(subjects(read_runs(runs))))
    ten = table["supcon, resnet50, cifar10, linear (SupContrast's README)"]
    hundred = table["supcon, resnet50, cifar100, linear (SupContrast's README)"]
    assert ten == {"published top-1 (%)": "96.00", "ours: a": "81.00"} | dict.fromkeys(("ours: b", "ours: c"), "")
    assert (hundred["ours: a"], hundred["ours: b"], hundred["ours: c"]) == ("", "72.00", "")
    assert not any("imagenet" in name for name in table)
    measure(runs[3], 12, record("linear", {"top1": 54.0}, **on(IMAGENET100)))
    assert any("imagenet100" in name for name in rows(published(subjects(read_runs(runs)))))
    assert published(subjects(read_runs(runs[2:3]))) is None


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (CIFAR10, "cifar10"),
        (CIFAR10 | {"source": "npz:a.npz"}, "cifar10"),
        (CIFAR10 | {"source": "digits"}, None),
        (CIFAR10 | {"train": 5_000}, None),
        (CIFAR100, "cifar100"),
        (CIFAR100 | {"source": "cifar10"}, None),
        (IMAGENET100, "imagenet100"),
        ({"classes": 1_000, "train": 1_281_167, "val": 50_000}, "imagenet1k"),  # a record of before sources were in it
        ({}, None),
    ],
)
def test_a_data_set_is_known_by_its_sizes_and_source(data, name):
    assert data_set(data) == name


def test_what_was_measured_on_other_data_stands_for_no_run(tmp_path):
    run = make_run(tmp_path / "a", "cifar10-varcon")
    other = {"data": {"dir": "data/y", "digest": "another"} | CIFAR10}
    records = [record("linear", {"top1": 80.0}, **on(CIFAR10)), record("linear", {"top1": 11.0}, **other)]
    measure(run, 12, *records, record("knn", {"top1_k20": 12.0}, **other))
    (subject,) = subjects(read_runs([run]))
    assert subject.record("linear")["metrics"] == {"top1": 80.0}
    assert subject.record("knn") is None
    assert "11.00" not in str(published([subject]))
    assert headlines([subject]).splitlines()[-1].split() == ["a", "80.00"]
    measure(run, 12, records[1])
    assert published(subjects(read_runs([run]))) is None
    assert headlines(subjects(read_runs([run]))) == "no accuracy was measured yet"


def test_pictures_of_embeddings_are_those_of_the_runs_own_data(tmp_path):
    run = make_run(tmp_path / "a")
    own = next(one for one in everything(12) if one["evaluator"] == "embedding_plot")
    other = own | {"data": {"dir": "data/y", "digest": "another"}}
    measure(run, 12, other)
    assert embeddings(read_runs([run])[0], 0) == []
    measure(run, 12, own, other)
    assert len(embeddings(read_runs([run])[0], 0)) == 3  # two methods, and the names of classes


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
    assert lines[0] == "top-1 accuracy in percent on held-out images"
    assert lines[2].split("  ")[-1].strip() == "linear, cached"
    assert [line.rsplit(maxsplit=2) for line in lines[3:]] == [
        ["raw pixels, 32x32", "97.50", "-"],
        ["untrained resnet18, 32x32, seed 0", "93.60", "-"],
        ["a", "98.90", "98.80"],
        ["b", "96.10", "-"],
    ]


def test_accuracies_on_different_data_are_said_to_be_so(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        measure(run, 12, record("knn", {"top1_k20": 98.9}, data={"dir": "d", "digest": run.name}))
        manifest = run / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"data_digest": "digest"', f'"data_digest": "{run.name}"'))
    assert headlines(subjects(read_runs(runs))).startswith("top-1 accuracy in percent on different held-out images\n")


def test_durations_are_for_people():
    assert [duration(seconds) for seconds in (5, 89, 120, 3600 * 2 + 61)] == ["5 s", "89 s", "2 min", "2 h 1 min"]


def test_runs_on_several_seeds_are_one_column_and_one_colour(tmp_path):
    runs = [make_run(tmp_path / f"varcon-seed{seed}", "digits-varcon", f"seed={seed}") for seed in range(3)]
    runs.append(make_run(tmp_path / "vssl", "digits-vssl"))
    for run, value in zip(runs, (50.0, 51.0, 53.0, 40.0), strict=True):
        untrained = record("knn", {"top1_k20": value - 10}, model="untrained")
        measure(run, 12, record("knn", {"top1_k20": value, "trustworthiness": None}), untrained)
    read = read_runs(runs)
    assert {run.look for run in read[:3]} == {read[0].look}
    assert read[0].look.name == "varcon (3 seeds)"
    assert read[3].look.name == "vssl"
    assert read[3].look.colour != read[0].look.colour
    found = rows(over_seeds(subjects(read)))["knn top1_k20 (%)"]
    # Student's t for two degrees of freedom is 4.3027; the deviation of 50, 51 and 53 is 1.5275.
    assert found["varcon (3 seeds)"] == "51.33 ± 3.79"
    assert found["vssl"] == "40.00"
    assert found["untrained resnet18, 32x32"] == "38.50 ± 9.23"
    assert over_seeds(subjects(read_runs(runs[:1]))) is None


def test_seeds_measured_at_different_steps_are_not_averaged(tmp_path):
    runs = [make_run(tmp_path / f"a-seed{seed}", "digits-varcon", f"seed={seed}") for seed in (0, 1, 2)]
    for run, step, value in zip(runs, (12, 8, 12), (90.0, 50.0, 92.0), strict=True):
        measure(run, step, record("knn", {"top1_k20": value}))
    table = over_seeds(subjects(read_runs(runs)))
    assert [column.text for column in table.columns] == [
        "metric",
        "a (3 seeds): 2 at step 12",
        "a (3 seeds): 1 at step 8",
    ]
    assert table.rows == [("knn top1_k20 (%)", "91.00 ± 12.71", "50.00")]


def test_runs_of_one_seed_are_no_repetitions_of_each_other(tmp_path):
    first, again = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b")])
    assert (first.look.name, again.look.name) == ("a", "b")
    assert first.look.colour != again.look.colour


def test_more_configurations_than_colours_are_told_apart_by_their_lines(tmp_path):
    runs = read_runs([make_run(tmp_path / f"{n}", "digits-varcon", f"optimizer.lr={n + 1}") for n in range(10)])
    assert len({(run.look.colour, run.look.line) for run in runs}) == 10
    assert runs[0].look.colour == runs[8].look.colour


def test_a_published_knn_accuracy_has_ours_beside_it(tmp_path):
    run = make_run(tmp_path / "a", "imagenet1k-varcon")
    data = {"dir": "data/imagenet1k", "digest": "digest", "classes": 1000, "train": 1_281_167, "val": 50_000}
    measure(run, 12, record("knn", {"top1_k20": 60.0, "top1_k200": 61.0}, data=data))
    found = rows(published(subjects(read_runs([run]))))
    shown = {name: cells["ours: a"] for name, cells in found.items() if "varcon" in name}
    assert {value for name, value in shown.items() if "kNN" in name} == {"61.00"}
    assert {value for name, value in shown.items() if "kNN" not in name} == {""}
