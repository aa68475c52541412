"""What a submission keeps: the code, the configuration, and where its runs are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from varscale.cluster.submission import Run, Submission, find, new_folder, snapshot, submissions_of, write_config
from varscale.config import load_config
from varscale.engine.manifest import git_revision
from varscale.errors import UserError


def test_a_snapshot_runs_by_itself_and_knows_its_revision(tmp_path):
    code = snapshot(tmp_path)
    (code / "varscale" / "mark.py").write_text("from varscale.engine.manifest import git_revision as r\nprint(r())")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "varscale.mark"],
        env={"PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(git_revision())
    assert (code / "varscale" / "ds_configs" / "zero1.json").is_file()


def test_a_snapshot_holds_the_compiled_code(tmp_path, repository):
    """To compile the loader's functions takes longer than all else that a rank does before its first step."""
    program = "from varscale.data.geometry import _evaluation_crop as f; f(20, 30, 10); print(f.stats.cache_hits)"

    def cache_hits(code):
        command = [sys.executable, "-P", "-c", program]
        return subprocess.run(command, env={"PYTHONPATH": str(code)}, capture_output=True, text=True, check=True).stdout

    cache_hits(repository)  # compiled now, if not before
    assert "): 1})" in cache_hits(snapshot(tmp_path))


def test_a_configuration_is_written_resolved_with_a_deepspeed_json_of_the_users_own(tmp_path, repository):
    own = tmp_path / "mine.json"
    own.write_text((repository / "ds_configs" / "zero1.json").read_text())
    (tmp_path / "configs").mkdir()
    config = load_config("digits-varcon", [f"deepspeed.config={own}", "optimizer.lr=0.5"])
    path = write_config(tmp_path, 3, config)
    own.write_text("{}")
    found = load_config(str(path))
    assert found.optimizer.lr == 0.5
    assert found.name == "digits-varcon"
    assert json.loads(Path(found.deepspeed.config).read_text())["zero_optimization"]["stage"] == 1


def test_submissions_are_found_by_the_run_or_the_sweep_it_belongs_to(tmp_path):
    base = tmp_path / "sweep"
    runs = [Run(name, base / name, tmp_path / "0.yaml", total_steps=10) for name in ("a", "b")]
    for job in ("7", "8"):
        Submission(new_folder(base), "slurm", 1, 2, 3, runs, job).save()
    (base / "c").mkdir()
    assert [submission.job for submission in submissions_of(base / "b")] == ["7", "8"]
    assert find(base / "a") == find(base)
    assert find(base).jobs == ["8_0", "8_1"]
    for other, message in ((base / "c", "no job was submitted for it"), (base / "d", "there is no such run")):
        with pytest.raises(UserError, match=message):
            find(other)
