"""What the tests of several tools share."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def killed_once_written(repository, tmp_path):
    """A function: start a tool whose last argument is a JSON file, kill it once that is there, and read it."""

    def run(name, *arguments):
        command = [sys.executable, repository / "tools" / f"{name}.py", *arguments]
        with open(tmp_path / "said", "wb") as said:
            process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said, start_new_session=True)
        deadline = time.monotonic() + 500
        try:
            while not Path(arguments[-1]).exists():
                assert process.poll() is None, (tmp_path / "said").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return json.loads(Path(arguments[-1]).read_text())

    return run


@pytest.fixture(scope="session")
def experiment(tool):
    return tool("experiment")


@pytest.fixture(scope="session")
def lists(experiment):
    return yaml.safe_load(experiment.LISTS.read_text())


@pytest.fixture(scope="session")
def measures(experiment, lists):
    return experiment.Measures(lists["columns"], [])


@pytest.fixture(scope="session")
def chosen(experiment, lists):
    return lambda name: experiment.chosen(lists["experiments"], name)
