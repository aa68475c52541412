"""A job on two nodes, disturbed in every way that a cluster knows, ends with the very tensors of one left alone."""

import math

import pytest
import torch

from varscale.engine.rundir import read_metrics

pytestmark = pytest.mark.slurm

DISTURB_AT = 7  # between two checkpoints


@pytest.fixture(scope="module")
def undisturbed_job(submit, tmp_path_factory):
    """A job that nothing happens to, done."""
    job = submit(tmp_path_factory.mktemp("undisturbed") / "run")
    job.finish()
    assert (job.step, job.restarts) == (20, 0)
    return job


@pytest.fixture(scope="module")
def undisturbed(undisturbed_job):
    """The tensors of its last checkpoint."""
    return undisturbed_job.finish()


@pytest.fixture
def disturbed(submit, tmp_path):
    """Submit a job with these options, and return it once it has come to a step."""

    def start(*options, step=DISTURB_AT):
        job = submit(tmp_path / "run", "checkpoint.every_steps=5", *options)
        job.wait_for(lambda job: job.step >= step)
        return job

    return start


def assert_same(job, undisturbed):
    found = job.finish()
    assert job.restarts >= 1
    assert job.step == 20
    assert found.keys() == undisturbed.keys()
    assert [name for name in found if not torch.equal(found[name], undisturbed[name])] == []


def test_usr2(cluster, submit, undisturbed, tmp_path):
    """What a time limit sends, and many clusters before they preempt: while the ranks start, and while they train."""
    job = submit(tmp_path / "run", "checkpoint.every_steps=5")
    for restarts, ready in enumerate((lambda job: job.ranks_printed(2), lambda job: job.step >= DISTURB_AT)):
        job.wait_for(ready)
        cluster.ask("scancel", "--signal=USR2", job.name)
        job.wait_for(lambda job, wanted=restarts + 1: job.restarts == wanted)
    assert_same(job, undisturbed)


def test_requeued_by_hand(cluster, disturbed, undisturbed):
    job = disturbed()
    cluster.ask("scontrol", "requeue", job.name)
    assert_same(job, undisturbed)


def test_preempted_by_a_job_of_higher_priority(cluster, disturbed, undisturbed):
    job = disturbed("--partition", "low", step=1)  # Slurm takes its time
    cluster.ask("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    assert_same(job, undisturbed)


def test_a_node_goes_down(cluster, disturbed, undisturbed):
    job = disturbed()
    cluster.lose_node("node2")
    try:
        assert_same(job, undisturbed)
    finally:
        cluster.start_node("node2")


@pytest.mark.slow
def test_the_time_limit(submit, undisturbed_job, tmp_path):
    """A minute, told 30 s before its end or (Slurm looks seldom) even earlier, for a run that trains for 25 s."""
    times = [line["time"] for line in read_metrics(undisturbed_job.run / "metrics.jsonl")]
    epochs = max(2, math.ceil(25 / (times[-1] - times[len(times) // 2])))  # the second half is an epoch
    settings = tmp_path / "cluster.yaml"
    settings.write_text("signal_delay: 30")
    options = [f"schedule.epochs={epochs}", "--settings", settings]
    expected = submit(tmp_path / "undisturbed", *options).finish(600)
    job = submit(tmp_path / "run", *options, "--time", "1")
    found = job.finish(900)
    assert job.restarts >= 1
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
