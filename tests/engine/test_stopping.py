"""Signals and a time limit leave a wish; a second signal, or one that comes too early to be granted, ends at once."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from varscale.engine.stopping import SAME, TIME_LIMIT, StopRequest, exit_code, reason_name


def start(body: str, rank: int = 0) -> subprocess.Popen:
    """A process that says "ready" under a StopRequest and then does `body`."""
    environment = os.environ | {"RANK": str(rank)}
    code = """
        import sys, time, signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where it was started in the background
        from varscale.engine.stopping import StopRequest
        with StopRequest() as stop:
            print("ready", flush=True)
    """
    code = textwrap.dedent(code) + textwrap.indent(textwrap.dedent(body), " " * 4)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR2, 75), (signal.SIGTERM, 75)])
def test_the_first_signal_is_a_wish_and_a_second_ends_at_once(number, code):
    process = start("""
        while not stop.reason:
            time.sleep(0.01)
        print(stop.reason, flush=True)
        import ctypes
        while True:  # each signal ends the sleep that it meets
            ctypes.CDLL(None).sleep(60)  # as in a collective: no handler of Python's runs meanwhile
    """)
    process.send_signal(number)
    assert int(process.stdout.readline()) == number
    process.send_signal(number)  # the launcher's, of the same event
    time.sleep(SAME + 0.5)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(30) == code


def test_ctrl_c_interrupts_at_once_until_it_is_deferred(ctrl_c_interrupts):
    process = start("""
        import ctypes
        while True:
            ctypes.CDLL(None).pause()  # as where the ranks wait for each other: no handler of Python's runs
    """)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr.read() == "\ninterrupted before the first step; the same command with --resume auto begins\n"
    process = start("""
        stop.defer_interrupts()
        print("deferred", flush=True)
        while not stop.reason:
            time.sleep(0.01)
        print(stop.reason, flush=True)
        time.sleep(60)
    """)
    assert process.stdout.readline() == "deferred\n"
    process.send_signal(signal.SIGINT)
    assert int(process.stdout.readline()) == signal.SIGINT
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline() == "SIGINT: stopping after this step; again in 3 s: at once\n"
    process.kill()


def test_only_rank_0_says_that_it_was_told():
    process = start("time.sleep(1)", rank=1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert process.stderr.read() == ""


def test_the_time_limit_is_a_reason_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)]
    with StopRequest(0.2 / 60) as stop:
        stop.defer_interrupts()
        stop.defer_interrupts()  # as after a rewind
        assert stop.reason == 0
        time.sleep(0.3)
        assert stop.reason == TIME_LIMIT
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert stop.reason == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)] == before
    assert (reason_name(TIME_LIMIT), reason_name(signal.SIGUSR2)) == ("the time limit", "SIGUSR2")
    assert [exit_code(reason) for reason in (signal.SIGINT, signal.SIGTERM, TIME_LIMIT)] == [130, 75, 75]
