"""What follows from how a job's ranks ended."""

import json
import socket
from contextlib import suppress

import pytest

from varscale.cluster.start import FAILED, Start, free_port
from varscale.cluster.submission import Run, Submission
from varscale.engine.stopping import PREEMPTED


@pytest.fixture
def start(tmp_path):
    """A job's first start, its folder made; two idle requeues are allowed."""
    run = Run("run", tmp_path / "run", tmp_path / "0.yaml", total_steps=10)
    submission = Submission(tmp_path, "slurm", nodes=2, ranks_per_node=1, idle_requeues=2, runs=[run], job="12")
    found = Start(submission, 0, "12", 0)
    found.begin()
    return found


def save_checkpoint(start, name):
    folder = start.submission.runs[0].directory / "checkpoints"
    (folder / name).mkdir(parents=True)
    (folder / "latest").write_text(name)


def test_done(start):
    assert start.decide(0)[:2] == (False, 0)


@pytest.mark.parametrize("status", [PREEMPTED, 128 + 12, 128 + 15, 128 + 9])
def test_preempted_ranks_go_on(start, status):
    """Where USR2, TERM or KILL ended them, it came before train.py had its handlers, or they took too long to save."""
    save_checkpoint(start, "step-00000005")
    decision = start.decide(status)
    assert decision.goes_on
    assert decision.reason.endswith("goes on from step-00000005")


@pytest.mark.parametrize("code", [1, 2, 3, 130])
def test_a_failure_ends_the_job_with_the_code_of_the_first_rank_that_failed(start, code):
    start.write_rank_end(0, PREEMPTED, "ConnectionError")
    start.write_rank_end(1, code)
    start.write_rank_end(2, FAILED, "later")
    assert start.decide(143)[:2] == (False, code)
    assert start.decide(143).reason.startswith("rank 1 on ")


def test_ranks_that_only_lost_another_go_on(start):
    start.write_rank_end(0, PREEMPTED, "RuntimeError: [gloo] Connection closed by peer")
    assert start.decide(1) == (True, 1, "a rank was lost; goes on from the beginning")


def test_told_to_stop_or_stuck(start):
    assert start.decide(PREEMPTED).reason.startswith("a rank was stuck; ")
    start.write_rank_end(0, PREEMPTED)
    assert start.decide(128 + 15).reason.startswith("preempted; ")


def test_ranks_that_could_not_start_do_not_go_on(start):
    decision = start.decide(127)
    assert decision == (False, 127, "the ranks could not start (exit code 127)")


def test_a_job_without_progress_is_given_up(start):
    assert [start.decide(PREEMPTED).goes_on for _ in range(2)] == [True, True]
    save_checkpoint(start, "step-00000005")
    assert [start.decide(PREEMPTED).goes_on for _ in range(2)] == [True, True]
    assert start.decide(PREEMPTED).reason.endswith("given up: 2 requeues brought no checkpoint after step-00000005")


def test_the_end_of_an_earlier_start_is_forgotten(start):
    start.end(start.decide(127))
    assert json.loads((start.submission.folder / "12.end.json").read_text())["code"] == 127
    assert start.submission.end("12")["code"] == 127
    start.begin()
    assert start.submission.end("12") is None


def test_a_start_passes_through_the_environment(start, monkeypatch):
    start.submission.save()
    for key, value in start.to_environment().items():
        monkeypatch.setenv(key, value)
    assert Start.from_environment() == start


@pytest.mark.parametrize("ephemeral", ["32768 60999", "1024 65535", "10001 65535", "10000 65500"])
def test_ports_are_free_and_not_always_the_same(ephemeral, tmp_path, monkeypatch):
    """Also where the kernel's own range leaves hardly a port outside, or none, or where that one is taken."""
    monkeypatch.setattr("varscale.cluster.start.EPHEMERAL_PORTS", tmp_path / "range")
    (tmp_path / "range").write_text(ephemeral.replace(" ", "\t") + "\n")
    with socket.socket() as taken:
        with suppress(OSError):  # then someone else has it
            taken.bind(("", 10000))
        ports = {free_port() for _ in range(20)}
    assert len(ports) > 10
    assert 10000 not in ports
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("", port))
