"""slurm/submit.py as its user meets it: mistakes, failures, sweeps, status and cancelling, on a real Slurm."""

import json
import subprocess
import time

import pytest
import yaml

from varscale.cluster.submission import submissions_of

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition", "hihg"], "--partition 'hihg': choose from high, low, main; nearest: high"),
        (["--nodes", "4"], "--nodes is 4, but the default partition has 3"),
        (["--time", "2:00:00"], "--time is 2:00:00, but the default partition allows 1:00:00"),
        (["--time", "soon"], "--time: time is 'soon'; write minutes, HH:MM:SS or D-HH:MM:SS"),
        (["--nodes", "two"], "--nodes is 'two': input should be a valid integer"),
        (["--gpus-per-node", "3", "batch.global_batch_size=36"], "sbatch: Batch job submission failed: Requested node"),
        (["--nodes", "3"], "32 images cannot be shared equally by 3 ranks"),
        (["lr=0.1"], "unknown key 'lr'; nearest: optimizer.lr"),
        (["data.dir=/nowhere"], "/nowhere"),
        (["--sweep", "optimizer.lr"], "--sweep 'optimizer.lr' is not of the form key.sub=A,B,C"),
        (["--cluster", "local"], "--nodes is 2, but --cluster local is this machine alone"),
    ],
)
def test_mistakes_are_told_in_one_line(submit_py, tiny, tmp_path, options, message):
    done = submit_py(*tiny, f"output_dir={tmp_path / 'run'}", *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: main", "unknown key 'partitoin'; nearest: partition"),
        ("time: 24:00:00", "write 86400 in quotes"),
        ("nodes: [", "cannot be read"),
    ],
)
def test_mistakes_in_the_settings(submit_py, tiny, tmp_path, text, message):
    settings = tmp_path / "cluster.yaml"
    settings.write_text(text)
    done = submit_py(*tiny[:2], "--settings", settings)
    assert done.returncode == 2
    assert str(settings) in done.stderr
    assert message in done.stderr


def test_a_dry_run_prints_script_and_plan_and_submits_nothing(submit_py, cluster, tiny, tmp_path):
    options = [f"output_dir={tmp_path / 'run'}", "--gpus-per-node", 2, "--cpus-per-rank", 2]
    done = submit_py(*tiny, *options, "--dry-run")
    assert done.returncode == 0, done.stderr
    for line in (
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--time=10",
        "--signal=USR2@120",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in done.stdout
    assert "accumulation 1 x world size 4" in done.stdout
    assert not (tmp_path / "run").exists()
    assert cluster.ask("squeue", "-h") == ""


@pytest.fixture
def held(submit, tmp_path):
    """Submit a job that waits until it is released; returns it."""
    settings = tmp_path / "held.yaml"
    settings.write_text(yaml.safe_dump({"sbatch": {"hold": True}}))
    return submit(tmp_path / "run", "--settings", settings)


def test_a_failed_rank_is_named_with_its_traceback(held, submit_py, cluster):
    """The snapshot runs, not the checkout: the error is put into the former."""
    code = held.submission.folder / "code" / "varscale" / "train.py"
    text = code.read_text()
    assert text.count("    learner.before_step(") == 1
    failing = "    if engine.global_rank == 1: raise RuntimeError('the camel is broken')\n    learner.before_step("
    code.write_text(text.replace("    learner.before_step(", failing))
    cluster.ask("scontrol", "release", held.name)
    done = submit_py("follow", held.run)
    seen = time.time()
    assert done.returncode == 1
    assert "rank 1 on node2 failed with exit code 1: RuntimeError: the camel is broken" in done.stdout
    assert "    if engine.global_rank == 1: raise RuntimeError" in done.stdout  # the traceback
    failed = json.loads((held.submission.starts(held.name)[0] / "rank-1.json").read_text())
    assert seen - failed["time"] < 60
    assert held.restarts == 0

    status = submit_py("status", held.run).stdout
    assert "FAILED (rank 1 on node2 failed)" in status
    assert "the camel is broken" in status


def test_cancel(submit, submit_py, cluster, tiny, tmp_path):
    job = submit(tmp_path / "run")
    job.wait_for(lambda job: job.state == "RUNNING")
    again = submit_py(*tiny, f"output_dir={job.run}")
    assert again.returncode == 2
    assert f"job {job.name} is at it already" in again.stderr
    status = submit_py("status", job.name).stdout.splitlines()
    assert status[0].split() == ["run", "job", "state", "nodes", "step", "restarts", "images/s"]
    assert status[1].split()[:4] == ["run", job.name, "RUNNING", "node[1-2]"]
    assert "of 20" in status[1]

    assert submit_py("cancel", job.run).returncode == 0
    job.wait_for(lambda job: job.state == "CANCELLED")
    cluster.wait_for(lambda: not cluster.ask("squeue", "-h"), 60)  # nor is it requeued
    assert "CANCELLED" in submit_py("status", job.run).stdout
    assert submit_py("follow", job.run).returncode == 1


def test_a_sweep_is_a_job_array(submit_py, cluster, tiny, tmp_path):
    base = tmp_path / "sweep"
    options = ["--nodes", 1, "--gpus-per-node", 1, "--sweep", "objective.epsilon=0.0,0.02", f"output_dir={base}"]
    options += ["batch.global_batch_size=64", "--follow"]
    done = submit_py(*tiny, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    job = submissions_of(base)[-1].job
    assert cluster.ask("scontrol", "show", "job", f"{job}_1").count("TresPerNode=gres:gpu:1") == 1
    names = ["objective.epsilon=0.0", "objective.epsilon=0.02"]
    for number, name in enumerate(names):
        config = yaml.safe_load((base / name / "config.yaml").read_text())
        assert config["objective"]["epsilon"] == float(name.partition("=")[2])
        assert f"[{name}] " in done.stdout
        for target in (base, base / name):
            lines = submit_py("status", target).stdout.splitlines()
            assert lines[1 + number].split()[0] == name
            assert "COMPLETED (done)" in lines[1 + number]
            assert "10 of 10" in lines[1 + number]


def test_where_there_is_no_run(submit_py, tmp_path):
    for command in ("status", "follow", "cancel"):
        done = submit_py(command, tmp_path / "nowhere")
        assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'nowhere'}: there is no such run\n")
        done = submit_py(command, "4711")
        assert done.returncode == 2
        assert "Slurm does not know job 4711" in done.stderr


def test_without_slurm(repository, tiny, tmp_path):
    import os
    import sys

    done = subprocess.run(
        [sys.executable, "slurm/submit.py", *map(str, tiny), f"output_dir={tmp_path / 'run'}"],
        cwd=repository,
        env=os.environ | {"PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "no sbatch on this machine" in done.stderr
    assert "--cluster local" in done.stderr
