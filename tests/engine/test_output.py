"""A program outlives its standard output and standard error."""

import subprocess
import sys

import pytest

CODE = """
import sys
from varscale.engine.output import outlive_output
{}
for stream in (sys.stdout, sys.stderr):
    for _ in range(10):
        print("x" * 5000, file=stream)
sys.exit(7)
"""


def run(*, closed: bool = False, code: str = "outlive_output()") -> int:
    """The exit code of a program that prints more than a buffer holds, to a full disk or to a pipe that was closed."""
    with open("/dev/full", "w") as full:
        output = subprocess.PIPE if closed else full
        process = subprocess.Popen([sys.executable, "-c", CODE.format(code)], stdout=output, stderr=output)
        if closed:
            process.stdout.close()
            process.stderr.close()
        return process.wait(60)


@pytest.mark.parametrize("closed", [False, True])
def test_what_cannot_be_printed_is_lost_alone(closed):
    assert run(closed=closed) == 7
    assert run(closed=closed, code="") != 7


def test_what_can_is_printed_at_once():
    code = "import os; from varscale.engine.output import outlive_output as o; o(); print('ä'); os._exit(0)"
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", code], capture_output=True)
    assert done.stdout.decode() == "ä\n"


def test_streams_that_somebody_put_in_their_place_stay(capsys):
    from varscale.engine.output import outlive_output

    outlive_output()
    print("here")
    assert capsys.readouterr().out == "here\n"
