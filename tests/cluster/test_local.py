"""`slurm/submit.py --cluster local`: two ranks on this machine, without Slurm."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from varscale.cluster.submission import submissions_of
from varscale.engine.manifest import git_revision
from varscale.engine.rundir import checkpoint_name, latest_checkpoint, read_metrics
from varscale.engine.stopping import PREEMPTED


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


@pytest.mark.slow  # tests/slurm has the same under Slurm itself
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


@pytest.fixture
def submit(submit_py, small_run):
    """Submit a run of 5 steps on two ranks: submit(its directory, *options); returns the submission."""

    def start(run, *options):
        small = ["--config", "digits-varcon", *small_run, "schedule.epochs=1", "schedule.warmup_epochs=0"]
        done = submit_py(*small, "--cluster", "local", "--ranks-per-node", 2, f"output_dir={run}", *options)
        assert done.returncode == 0, done.stderr
        return submissions_of(run)[-1]

    return start


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def processes_of(submission):
    """The processes that know of a submission, by their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if bytes(submission.folder) in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


@pytest.mark.slow
def test_a_sweep_one_of_whose_ranks_fails(submit, submit_py, tmp_path):
    """The snapshot is broken once the first run has read it: the second one fails."""
    base = tmp_path / "sweep"
    first, second = (base / f"objective.epsilon={epsilon}" for epsilon in (0.0, 0.02))
    submission = submit(base, "--sweep", "objective.epsilon=0.0,0.02")
    wait_for((first / "metrics.jsonl").exists)
    code = submission.folder / "code" / "varscale" / "train.py"
    place = '    in_phase("loss")(learner.before_step)('
    failing = f"    if engine.global_rank == 1: raise RuntimeError('the camel is broken')\n{place}"
    assert place in code.read_text()
    code.write_text(code.read_text().replace(place, failing))
    done = submit_py("follow", base)
    assert done.returncode == 1
    assert f"[{second.name}] rank 1 on {os.uname().nodename} failed with exit code 1: RuntimeError: " in done.stdout
    assert failing.splitlines()[0] in done.stdout  # the traceback
    lines = submit_py("status", base).stdout.splitlines()
    assert "COMPLETED (done)" in lines[1]
    assert "5 of 5" in lines[1]
    assert f"FAILED (rank 1 on {os.uname().nodename} failed)" in lines[2]
    assert read_metrics(second / "metrics.jsonl") == []


@pytest.mark.slow
def test_a_cancelled_job_keeps_what_it_had_and_a_killed_one_leaves_nobody_behind(submit, submit_py, tmp_path):
    run = tmp_path / "run"
    submit(run, "schedule.epochs=100")
    wait_for(lambda: read_metrics(run / "metrics.jsonl"))
    assert submit_py("cancel", run).returncode == 0
    assert submit_py("follow", run).returncode == PREEMPTED
    assert "CANCELLED" in submit_py("status", run).stdout
    step = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert latest_checkpoint(run).name == checkpoint_name(step)

    submission = submit(run, "schedule.epochs=100")  # which goes on
    wait_for(lambda: len(processes_of(submission)) >= 4)  # submitit's, the leader, two ranks
    os.kill(int(submission.job), signal.SIGKILL)
    wait_for(lambda: not processes_of(submission), 15)
    assert "UNKNOWN" in submit_py("status", run).stdout
