"""What is found in a run's directory: metrics, also beside damaged lines, and what was measured on its checkpoints."""

import json

import pytest

from varscale.engine.checkpoints import write_checkpoint
from varscale.engine.rundir import evaluation_files, read_evaluation, read_results, read_sound_metrics
from varscale.errors import UserError


@pytest.fixture
def run(tmp_path):
    for step in (3, 7):
        write_checkpoint(tmp_path / "run", step, {}, {}, keep=2)
    return tmp_path / "run"


def measure(run, step, value):
    path = run / "evaluation" / f"step-{step:08d}.json"
    path.parent.mkdir(exist_ok=True)
    record = {"model": "trained", "evaluator": "knn", "metrics": {"top1_k20": value}, "details": {}}
    path.write_text(json.dumps({"checkpoint": path.stem, "step": step, "results": [record]}))
    return path


def test_results_are_those_of_the_newest_checkpoint_and_all_are_found_oldest_first(run):
    newest, older = measure(run, 7, 90.0), measure(run, 3, 50.0)
    (record,) = read_results(run)
    assert record["metrics"] == {"top1_k20": 90.0}
    assert evaluation_files(run) == [older, newest]
    assert [read_evaluation(path)["step"] for path in evaluation_files(run)] == [3, 7]
    newest.unlink()
    with pytest.raises(UserError, match=r"step-00000007.json: not measured yet; python -m varscale.evaluate"):
        read_results(run)


RECORDS = (3, {"metrics": 3}, {"model": "a", "evaluator": "b", "metrics": {}})  # the last has no details


@pytest.mark.parametrize("text", ["{", "[]", '{"results": 3}', *(json.dumps({"results": [one]}) for one in RECORDS)])
def test_a_damaged_file_of_results_is_named(run, text):
    measure(run, 7, 90.0).write_text(text)
    with pytest.raises(UserError, match=r"step-00000007.json: not a file of results"):
        read_results(run)


def test_damaged_lines_are_numbered_and_an_unfinished_one_is_none(tmp_path):
    good = [{"kind": "train", "step": step, "time": 0.0, "loss": 1.0} for step in (1, 2, 3)]
    texts = [json.dumps(line) for line in good]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes("\n".join([texts[0], "\0\0\0", texts[1], "3", texts[2], '{"kind": "tr']).encode() + b"\xff")
    assert read_sound_metrics(path) == (good, [2, 4])
    assert read_sound_metrics(tmp_path / "none.jsonl") == ([], [])
