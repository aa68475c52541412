"""The file of results and the table: units, numbers that JSON does not know, details and pictures."""

import json
import math
from multiprocessing import get_context
from types import SimpleNamespace

import pytest

from varscale.evaluation.context import NUMBER, Result
from varscale.evaluation.drawing import class_colours, new_figure
from varscale.evaluation.results import Report

INFO = SimpleNamespace(digest="0123456789abcdef", source="digits", num_classes=3, num_samples=lambda split: 7)


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path / "evaluation" / "step-1.json", 1, tmp_path / "data", INFO)


def records(report) -> list[dict]:
    return json.loads(report.path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["results"]


def test_every_metric_has_its_unit_and_is_shown_by_it(report):
    report.add("trained", "a", Result({"top1": 12.345, "ece": 0.01234}, {}, units={"ece": NUMBER}), {})
    assert records(report)[0]["units"] == {"top1": "%", "ece": ""}
    rows = [line.split() for line in report.table().splitlines() if line.startswith("a ")]
    assert rows == [["a", "top1", "%", "12.35"], ["a", "ece", "-", "0.0123"]]


def test_what_is_not_finite_is_null_and_a_dash(report):
    report.add("trained", "a", Result({"x": math.nan, "y": math.inf}, {}, details={"z": [1.0, (math.nan,)]}), {})
    (record,) = records(report)
    assert record["metrics"] == {"x": None, "y": None}
    assert record["details"] == {"z": [1.0, [None]]}
    assert report.table().count(" -\n") == 2


def add_many(report: Report, model: str) -> None:
    for number in range(40):
        report.add(model, f"evaluator_{number}", Result({"top1": 1.0}, {}), {})


def test_two_evaluations_at_once_lose_nothing(report):
    processes = [get_context("fork").Process(target=add_many, args=(report, model)) for model in ("a", "b", "c")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(records(report)) == 120
    assert [path.name for path in report.path.parent.glob("[!.]*")] == [report.path.name]


def test_models_without_a_metric_have_a_dash(report):
    report.add("trained", "a", Result({"x": 1.0}, {}), {})
    report.add("pixels", "b", Result({"x": 2.0}, {}), {})
    rows = [line.split() for line in report.table().splitlines() if line[:2] in ("a ", "b ")]
    assert rows == [["a", "x", "%", "1.00", "-"], ["b", "x", "%", "-", "2.00"]]


def test_a_record_takes_one_line_however_long_its_details(report):
    for number in range(3):
        report.add("trained", f"e{number}", Result({}, {}, details={"rows": list(range(1000))}), {})
    assert len(report.path.read_text().splitlines()) == 5
    assert [one["evaluator"] for one in records(report)] == ["e0", "e1", "e2"]


def test_results_of_other_variants_and_data_stay_and_are_told_apart(report, tmp_path):
    flowers = SimpleNamespace(digest="fedcba9876543210", source="npz:f", num_classes=5, num_samples=lambda split: 9)
    for variant, data in (("x", None), ("y", None), ("x", (tmp_path / "flowers", flowers)), ("x", None)):
        report.add("trained", "a", Result({"top1": 1.0}, {}, data=data, variant=variant), {}, new_figure()[0])
    found = [(one["variant"], one["data"]["digest"], one["data"]["classes"]) for one in records(report)]
    assert found == [("y", INFO.digest, 3), ("x", flowers.digest, 5), ("x", INFO.digest, 3)]
    labels = [line.split("  ")[0] for line in report.table().splitlines() if line.startswith("a ")]
    assert labels == ["a (x)", "a (y)", "a (x) on flowers"]
    assert records(report)[0]["picture"] != records(report)[2]["picture"]


def test_pictures_are_named_after_evaluator_model_and_other_data(report):
    names = []
    for other in (report, Report(report.path, 1, report.directory, INFO, other_data=True)):
        for model in ("trained", "pixels"):
            other.add(model, "a", Result({}, {}), {}, new_figure()[0])
            names.append(records(other)[-1]["picture"])
    assert names == [f"step-1/a{end}.png" for end in ("", "-pixels", "-01234567", "-pixels-01234567")]
    assert all((report.path.parent / name).is_file() for name in names)


@pytest.mark.parametrize("count", [2, 10, 17, 100])
def test_colours_of_classes_differ(count):
    assert len({tuple(colour) for colour in class_colours(count)}) == count
