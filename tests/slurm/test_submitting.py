"""slurm/submit.py as its user meets it: mistakes, failures, sweeps, status and cancelling, on a real Slurm."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml

from varscale.cluster.submission import submissions_of
from varscale.config import load_config, to_yaml

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


@pytest.fixture
def follow(cluster, repository):
    """Run `submit.py follow RUN` to its end; returns the exit code, and when each line that it printed came."""

    def run(target):
        command = [sys.executable, "slurm/submit.py", "follow", str(target)]
        with subprocess.Popen(
            command, cwd=repository, env=cluster.environment, stdout=subprocess.PIPE, text=True
        ) as process:
            seen = {line.rstrip(): time.time() for line in process.stdout}
        return process.returncode, seen

    return run


def test_a_failed_rank_is_named_with_its_traceback_within_seconds(held, submit_py, follow, cluster):
    """The snapshot runs, not the checkout: the error is put into the former."""
    code = held.submission.folder / "code" / "varscale" / "train.py"
    text = code.read_text()
    place = "    terms = []\n"  # in take_step
    assert text.count(place) == 1
    failing = f"    if engine.global_rank == 1: raise RuntimeError('the camel is broken')\n{place}"
    code.write_text(text.replace(place, failing))
    cluster.ask("scontrol", "release", held.name)
    exit_code, seen = follow(held.run)
    assert exit_code == 1
    failed = json.loads((held.submission.starts(held.name)[0] / "rank-1.json").read_text())["time"]
    for line in (
        "rank 1 on node2 failed with exit code 1: RuntimeError: the camel is broken",
        "    if engine.global_rank == 1: raise RuntimeError('the camel is broken')",  # the traceback
    ):
        assert seen[line] - failed < 5
    assert held.restarts == 0

    status = submit_py("status", held.run).stdout
    assert "FAILED (rank 1 on node2 failed)" in status
    assert "the camel is broken" in status


@pytest.mark.slow
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


@pytest.fixture
def submit_array(submit_py, cluster, tiny, tmp_path):
    """Submit runs on one node each as one array, wait for its end, and check what is said of it.

    submit_array(the names of the runs in tmp_path / "all", *options); returns the configuration of each.
    """

    def run(names, *options):
        base = tmp_path / "all"
        short = ["batch.global_batch_size=64", "schedule.epochs=1", "schedule.warmup_epochs=0"]
        done = submit_py(*tiny[2:], *short, "--nodes", 1, "--gpus-per-node", 1, "--follow", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        job = submissions_of(base)[-1].job
        assert cluster.ask("scontrol", "show", "job", f"{job}_1").count("TresPerNode=gres:gpu:1") == 1
        lines = submit_py("status", base).stdout.splitlines()
        for number, name in enumerate(names):
            assert f"[{name}] " in done.stdout
            assert lines[1 + number].split()[0] == name
            assert "COMPLETED (done)" in lines[1 + number]
            assert "5 of 5" in lines[1 + number]
        assert submit_py("status", base / names[-1]).stdout.splitlines() == lines
        return [yaml.safe_load((base / name / "config.yaml").read_text()) for name in names]

    return run


@pytest.mark.slow
def test_a_sweep_is_a_job_array(submit_array, tmp_path):
    names = ["objective.epsilon=0.0", "objective.epsilon=0.02"]
    options = ["--config", "digits-varcon", "--sweep", "objective.epsilon=0.0,0.02", f"output_dir={tmp_path / 'all'}"]
    configs = submit_array(names, *options)
    assert [config["objective"]["epsilon"] for config in configs] == [0.0, 0.02]


@pytest.fixture
def two_recipes(tmp_path):
    """The options for two recipes whose runs lie in one folder."""
    for name in ("varcon", "vssl"):
        recipe = load_config(f"digits-{name}", [f"output_dir={tmp_path / 'all' / name}"])
        (tmp_path / f"{name}.yaml").write_text(to_yaml(recipe))
    return [f"--config={tmp_path / 'varcon.yaml'}", f"--config={tmp_path / 'vssl.yaml'}"]


@pytest.mark.slow
def test_several_configurations_are_a_job_array(submit_array, two_recipes):
    configs = submit_array(["varcon", "vssl"], *two_recipes)
    assert [config["objective"]["name"] for config in configs] == ["varcon", "vssl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["output_dir={base}/a"], "vssl.yaml: output_dir is {base}/a, as that of {base}/varcon.yaml\n"),
        (["--config", "digits-varcon"], "output_dir is runs/digits-varcon, but that of {base}/varcon.yaml lies in"),
        (["--sweep", "optimizer.lr=0.1,0.2"], "--sweep goes with a single --config\n"),
    ],
)
def test_configurations_that_do_not_go_together(submit_py, two_recipes, tmp_path, options, message):
    done = submit_py(*two_recipes, *(option.format(base=tmp_path) for option in options))
    assert done.returncode == 2
    assert message.format(base=tmp_path) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_where_there_is_no_run(submit_py, tmp_path):
    for command in ("status", "follow", "cancel"):
        done = submit_py(command, tmp_path / "nowhere")
        assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'nowhere'}: there is no such run\n")
        done = submit_py(command, "4711")
        assert done.returncode == 2
        assert "Slurm does not know job 4711" in done.stderr


def test_without_slurm(repository, tiny, tmp_path):
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
