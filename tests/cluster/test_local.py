"""`slurm/submit.py --cluster local`: two ranks on this machine, without Slurm."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from varscale.cluster.submission import submissions_of
from varscale.engine.manifest import git_revision
from varscale.engine.rundir import read_metrics


@pytest.fixture
def submit_py(repository):
    """Run slurm/submit.py without Slurm's programs; returns the completed process."""

    def run(*arguments, timeout=300):
        return subprocess.run(
            [sys.executable, "slurm/submit.py", *map(str, arguments)],
            cwd=repository,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def test_a_job_is_preempted_goes_on_and_ends(submit_py, small_run, tmp_path):
    run = tmp_path / "run"
    options = ["--cluster", "local", "--ranks-per-node", 2, "checkpoint.every_steps=2", f"output_dir={run}"]
    done = submit_py("--config", "digits-varcon", *small_run, *options)
    assert done.returncode == 0, done.stderr
    (submission,) = submissions_of(run)
    again = submit_py("--config", "digits-varcon", *small_run, *options)
    assert (again.returncode, "is at it already" in again.stderr) == (2, True)
    assert submit_py("status", run).stdout.splitlines()[1].split()[2] == "RUNNING"

    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    leader = int(Path(f"/proc/{submission.job}/task/{submission.job}/children").read_text())
    os.kill(leader, signal.SIGUSR2)
    done = submit_py("follow", run)
    assert done.returncode == 0, done.stdout
    assert "preempted; goes on from step-" in done.stdout
    assert "step" in done.stdout
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, 11))
    status = submit_py("status", run).stdout.splitlines()[1]
    assert "COMPLETED (done)" in status
    assert "10 of 10" in status
    manifest = json.loads((run / "manifest.json").read_text())
    assert len(manifest["starts"]) == 2
    assert manifest["starts"][0]["git_revision"] == git_revision()
