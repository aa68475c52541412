"""slurm/srun.sbatch and slurm/deepspeed.sbatch: told to save by USR2, requeued, done."""

import time

import pytest

from varscale.engine.rundir import read_metrics

pytestmark = pytest.mark.slurm


@pytest.fixture
def sbatch(cluster, repository, small_run, tmp_path):
    """Submit a script with options, tell it USR2 once it trains, and wait until it is done; returns what it printed."""

    def run(script, *options):
        log, metrics = tmp_path / "log", tmp_path / "run" / "metrics.jsonl"
        setup = ["--time=10", f"--output={log}", f"--chdir={repository}"]
        training = ["--config", "digits-varcon", *small_run, f"output_dir={tmp_path / 'run'}"]
        job = cluster.ask("sbatch", "--parsable", *setup, *options, repository / "slurm" / script, *training).strip()

        def wait_for(condition, what):
            deadline = time.monotonic() + 150
            while not condition():
                assert time.monotonic() < deadline, f"{what}\n{log.read_text()}"
                time.sleep(0.1)

        def is_done():
            return "JobState=COMPLETED" in cluster.ask("scontrol", "show", "job", job)

        wait_for(lambda: len(read_metrics(metrics)) >= 2, "no step was taken")
        cluster.ask("scancel", "--signal=USR2", job)
        wait_for(is_done, "the job did not complete")
        assert "Restarts=1 " in cluster.ask("scontrol", "show", "job", job)
        assert [line["step"] for line in read_metrics(metrics)] == list(range(1, 11))
        return log.read_text()

    return run


@pytest.mark.slow
def test_srun(sbatch):
    assert "stopped by SIGUSR2" in sbatch("srun.sbatch", "--nodes=2", "--ntasks-per-node=1")


@pytest.mark.slow
def test_deepspeed(sbatch):
    assert "stopped by SIGUSR2" in sbatch("deepspeed.sbatch", "--export=ALL,RANKS=2", "--cpus-per-task=2")


def test_requeues_are_capped(cluster, repository, tmp_path):
    """Where one rank fails every time, and another, left hanging, says 75, which is what srun returns."""
    program = tmp_path / "varscale" / "train.py"
    program.parent.mkdir()
    program.write_text("import os, sys; sys.exit(1 if os.environ.get('SLURM_PROCID') == '1' else 75)")
    allowed = {"srun.sbatch": 1, "deepspeed.sbatch": 0}
    jobs = {}
    for script, count in allowed.items():
        options = ["--time=10", "--ntasks=2", f"--export=ALL,MAX_RESTARTS={count},RANKS=1"]
        options += [f"--chdir={tmp_path}", f"--output={tmp_path / script}"]
        jobs[script] = cluster.ask("sbatch", "--parsable", *options, repository / "slurm" / script).strip()
    for script, job in jobs.items():
        cluster.wait_for(lambda job=job: "JobState=FAILED" in cluster.ask("scontrol", "show", "job", job), 60)
        said = cluster.ask("scontrol", "show", "job", job)
        assert f"Restarts={allowed[script]} " in said
        assert "ExitCode=75:0" in said
        assert f"given up after {allowed[script]} restarts" in (tmp_path / script).read_text()
