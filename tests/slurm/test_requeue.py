"""A job on two nodes, disturbed in every way that a cluster knows, ends with the very tensors of one left alone."""

import pytest
import torch

pytestmark = pytest.mark.slurm

DISTURB_AT = 7  # between two checkpoints


@pytest.fixture(scope="module")
def undisturbed(submit, tmp_path_factory):
    """The last checkpoint's tensors of a job that nothing happens to."""
    job = submit(tmp_path_factory.mktemp("undisturbed") / "run")
    tensors = job.finish()
    assert (job.step, job.restarts) == (20, 0)
    return tensors


@pytest.fixture
def disturbed(submit, tmp_path):
    """Submit a job with these options, and return it once it has come so far."""

    def start(*options):
        job = submit(tmp_path / "run", "checkpoint.every_steps=5", *options)
        job.wait_for(lambda job: job.step >= DISTURB_AT)
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
    job = disturbed("--partition", "low")
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
def test_the_time_limit(disturbed, undisturbed):
    job = disturbed("--time", "1", "schedule.epochs=2")
    assert_same(job, undisturbed)
