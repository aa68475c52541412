"""The watchdog counts from the first step on, shows where it stands, and knows a failed rank from a stuck one."""

import os
import subprocess
import sys
import textwrap
import time

import pytest

CODE = """
import sys, time, torch
import torch.distributed as dist
from varscale.engine import distributed, watchdog
watchdog.FAREWELL = 2.5  # of which the question for a failed rank takes two
rank = int(sys.argv[1])
ranks = distributed.Ranks(rank, rank, 2, 2, torch.device("cpu"))
seconds, compiles = map(float, sys.argv[2:])
dog = watchdog.Watchdog(seconds, ranks, compiles=bool(compiles))
"""


def start(body: str, rank: int = 0, port: int = 0, seconds: float = 0.5, compiles: int = 0) -> subprocess.Popen:
    """A process that has a Watchdog, not yet entered, and does `body`."""
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", CODE + textwrap.dedent(body), *map(str, (rank, seconds, compiles))]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def assert_first_names_the_cause(body: str, port: int, seconds: float) -> None:
    """Of two ranks that do `body`, of which the second announces a failure and lingers, the first ends and says so."""
    first, second = (start(body, rank, port, seconds) for rank in range(2))
    try:
        said = first.communicate(timeout=60)[1]
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 1, said
    assert said.splitlines()[-1] == "error: another rank failed: rank 1: out of memory"


def test_it_counts_from_its_entry():
    process = start("""
        time.sleep(1)
        with dog:
            time.sleep(0.2)
        time.sleep(1)
        sys.exit(7)
    """)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 7, said


def test_it_ends_a_process_that_stands_still():
    process = start("""
        watchdog.announced_failure = lambda **_: time.sleep(60)  # the store hangs, too
        with dog:
            dog.beat(5)
            time.sleep(60)
    """)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert "watchdog: rank 0 of 2 on " in said
    assert "has done nothing for 0.5 s (safety.watchdog_seconds); the last step it saw done was 5" in said
    assert 'File "<string>"' in said, "the stack"


@pytest.mark.slow
def test_a_rank_that_waits_for_one_that_failed_is_not_taken_for_stuck(free_port):
    body = """
        dist.init_process_group("gloo", rank=rank, world_size=2)
        if rank == 1:
            distributed.announce_failure(ranks, "out of memory")
            time.sleep(60)  # as where the end of a process hangs
        with dog:
            distributed.meet(ranks)
    """
    assert_first_names_the_cause(body, free_port(), seconds=0.5)


def test_word_of_a_failed_rank_does_not_wait_for_the_watchdogs_time(free_port):
    """As with NCCL, whose collectives do not break when another rank ends."""
    body = """
        dist.init_process_group("gloo", rank=rank, world_size=2)
        watchdog.LOOK = watchdog.GRACE = 1.0
        if rank == 1:
            distributed.announce_failure(ranks, "out of memory")
        with dog:
            time.sleep(600 if rank == 1 else 60)
    """
    begun = time.monotonic()
    assert_first_names_the_cause(body, free_port(), seconds=3600)
    assert time.monotonic() - begun < 50


def test_the_first_step_may_take_long_where_it_is_compiled():
    process = start(
        """
        with dog:
            dog.beat()
            time.sleep(2)
            dog.beat(1)
            time.sleep(60)
        """,
        compiles=1,
    )
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert "the last step it saw done was 1" in said
