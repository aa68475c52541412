"""The curves show what was recorded, averaged only where there is too much of it, and histograms by epoch."""

import json

import numpy as np
import pytest
from made_runs import make_run

from varscale.reporting.curves import CURVES, MOST_POINTS, _lines, _thin, by_epoch, curves, histograms
from varscale.reporting.measured import throughput
from varscale.reporting.runs import read_runs


def test_a_histogram_by_epoch_is_the_sum_over_its_lines():
    lines = [
        {"epoch": 0.5, "tau2_histogram": [1.0, 0.0, 3.0]},
        {"epoch": 1.0, "tau2_histogram": [3.0, 1.0, 0.0]},
        {"epoch": 4 / 3, "tau2_histogram": [0.0, 0.0, 5.0]},
        {"epoch": 3.0, "tau2_histogram": [2.0, 2.0, 0.0]},
    ]
    epochs, shares = by_epoch(lines)
    assert epochs.tolist() == [1, 2, 3]
    assert shares == pytest.approx(np.array([[0.5, 0.125, 0.375], [0, 0, 1], [0.5, 0.5, 0]]))


def test_a_long_curve_is_averaged_and_a_short_one_is_not():
    assert _thin(range(MOST_POINTS)).tolist() == list(range(MOST_POINTS))
    long = _thin(range(2 * MOST_POINTS + 1))
    assert len(long) <= MOST_POINTS
    assert long[:2].tolist() == [1.0, 4.0]
    assert np.isnan(_thin([None, 1.0])[0])


def test_every_curve_has_the_runs_that_recorded_it(tmp_path):
    runs = read_runs([make_run(tmp_path / "ours", "digits-varcon"), make_run(tmp_path / "theirs", "digits-vssl")])
    found = {picture.name: picture for picture in curves(runs)}
    assert list(found) == [curve.name for curve in CURVES]
    for name in ("loss", "kl", "nll", "learning-rate", "knn"):
        assert "ours" in found[name].svg, name
        assert "theirs" in found[name].svg, name
    # A single run needs no legend: its panel names the curve alone.
    assert not any("theirs" in found[name].svg for name in ("tau2", "confidence", "kl-share", "spread", "logvar"))
    assert [picture.title for picture in histograms(runs)] == ["ours: distribution of tau2 by epoch"]


def test_what_an_objective_of_tomorrow_records_is_drawn_too(tmp_path):
    run = make_run(tmp_path / "run")
    lines = [
        {"kind": "train", "step": s, "time": 0.0, "epoch": s, "some_term": s, "bad_sample_count": 0} for s in (1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [picture.title for picture in curves(read_runs([run]))] == ["some term"]


def test_runs_that_recorded_no_epochs_are_drawn_by_step(tmp_path):
    run = make_run(tmp_path / "run")
    lines = [{"kind": "train", "step": step, "time": 0.0, "epoch": step / 2, "loss": 1.0} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "epoch</text>" in curves(read_runs([run]))[0].svg
    for line in lines:
        line.pop("epoch")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "step</text>" in curves(read_runs([run]))[0].svg
    assert histograms(read_runs([run])) == []


def test_lines_that_lack_what_a_curve_is_made_of_are_left_out(tmp_path):
    run = make_run(tmp_path / "a")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for lacks, line in zip(("kl", "tau2_std", "step_ms_p90", "loss"), lines, strict=False):
        del line[lacks]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = read_runs([run])
    assert {one.name for one in curves(runs)} >= {"loss", "kl-share", "tau2"}
    assert {one.name for one in throughput(runs)} == {"throughput", "step-times", "data-wait"}


def test_shares_of_the_loss_have_the_weights_of_the_terms(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "run", "digits-varcon", "objective.nll_weight=0.25")])
    shares = {
        curve.name: [curve.value(line) for line in _lines(run, curve)] for curve in CURVES if "share" in curve.name
    }
    # KL is half of NLL there: 1 x 1 beside 0.25 x 2.
    assert shares["kl-share"] == pytest.approx([2 / 3] * 12)
    assert shares["nll-share"] == pytest.approx([1 / 3] * 12)
