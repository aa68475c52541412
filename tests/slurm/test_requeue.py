"""A job on two nodes, disturbed in every way that a cluster knows, ends with the very tensors of one left alone."""

import os
import re
import signal

import pytest
import torch

pytestmark = pytest.mark.slurm

DISTURB_AT = 7  # between two checkpoints


@pytest.fixture(scope="module")
def undisturbed(submit, tmp_path_factory):
    """The last tensors of a job that nothing happens to."""
    job = submit(tmp_path_factory.mktemp("undisturbed") / "run")
    tensors = job.finish()
    assert (job.step, job.restarts) == (20, 0)
    return tensors


@pytest.fixture
def disturbed(submit, tmp_path):
    """Submit a job with these options, and return it once it has come to step DISTURB_AT."""

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


@pytest.mark.slow
def test_usr2_and_requeued_by_hand(cluster, submit, undisturbed, tmp_path):
    """USR2, which many clusters send before they preempt, while the ranks start and while they train; then by hand."""
    job = submit(tmp_path / "run", "checkpoint.every_steps=5")
    usr2, requeue = ("scancel", "--signal=USR2"), ("scontrol", "requeue")
    disturbances = (
        (lambda job: job.ranks_printed(2), usr2),
        (lambda job: job.step >= DISTURB_AT, usr2),
        (lambda job: job.step >= DISTURB_AT + 4, requeue),
    )
    for restarts, (is_due, command) in enumerate(disturbances):
        job.wait_for(is_due)
        cluster.ask(*command, job.name)
        job.wait_for(lambda job, wanted=restarts + 1: job.restarts == wanted)
    assert_same(job, undisturbed)


def test_preempted_by_a_job_of_higher_priority(cluster, disturbed, undisturbed):
    job = disturbed("--partition", "low")
    other = ["--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"]
    with job.held_until_told():
        cluster.ask("sbatch", *other)
    assert_same(job, undisturbed)
    assert "preempted; goes on from step-" in job.log


@pytest.mark.slow
def test_the_time_limit(disturbed, undisturbed, tmp_path):
    """Slurm's shortest limit, a minute. It looks every 30 s and allows for that: the signal comes after 29 to 59 s."""
    settings = tmp_path / "cluster.yaml"
    settings.write_text("signal_delay: 1")
    job = disturbed("--settings", settings, "--time", 1)
    with job.held_until_told():
        pass
    assert_same(job, undisturbed)
    assert "preempted; goes on from step-" in job.log


@pytest.mark.slow
@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_node_goes_down(cluster, disturbed, undisturbed, node):
    """That of rank 0, which also runs the job's own script; or that of rank 1."""
    job = disturbed()
    cluster.lose_node(node)
    try:
        assert_same(job, undisturbed)
    finally:
        cluster.start_nodes()


@pytest.mark.slow
def test_a_rank_that_hangs(disturbed, undisturbed):
    job = disturbed("safety.watchdog_seconds=12")
    os.kill(job.rank_process(1), signal.SIGSTOP)
    assert_same(job, undisturbed)
    pattern = r"watchdog: rank 0 of 2 on node1 has done nothing for 12 s .*; the last step it saw done was (\d+)"
    said = re.search(pattern, job.log)
    assert int(said[1]) >= DISTURB_AT
    assert re.search(r"a rank was (stuck|lost); goes on from step-", job.log)
