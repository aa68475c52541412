"""A Slurm cluster for the tests of this folder, and jobs submitted to it as a user would.

Where Slurm is not installed the tests are skipped, or fail with REQUIRE_SLURM=1. A cluster that does not start fails.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file
from slurm_cluster import Cluster, missing
from torch import Tensor

from varscale.cluster import slurm
from varscale.cluster.submission import submissions_of
from varscale.engine.rundir import latest_checkpoint, read_metrics


@pytest.fixture(scope="session")
def cluster():
    """Three nodes, idle."""
    if reason := missing():
        (pytest.fail if os.environ.get("REQUIRE_SLURM") == "1" else pytest.skip)(reason)
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: a socket's path ends at 108 bytes
    root.chmod(0o755)
    running = Cluster(root)
    try:
        running.start()
        os.environ["SLURM_CONF"] = running.environment["SLURM_CONF"]
        yield running
    finally:
        running.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(autouse=True)
def idle(cluster):
    """After each test, all nodes are there and have nothing to do."""
    yield
    cluster.start_nodes()
    cluster.ask("scancel", "--user=root")
    cluster.wait_for(lambda: not cluster.ask("squeue", "-h"), 60, "for the jobs of a test to end")


@pytest.fixture(scope="session")
def submit_py(cluster, repository):
    """Run `python slurm/submit.py *arguments` on the cluster; returns the completed process."""

    def run(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "slurm/submit.py", *map(str, arguments)],
            cwd=repository,
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def tiny(small_run):
    """Options of submit.py for a run of 20 steps on two nodes, a rank on each."""
    return ["--config", "digits-varcon", "--nodes", 2, "--time", 10, *small_run, "batch.global_batch_size=32"]


@pytest.fixture(scope="session")
def submit(submit_py, cluster, tiny):
    """Submit such a run: submit(its directory, *further options or overrides)."""

    def start(run: Path, *options: object) -> Job:
        done = submit_py(*tiny, f"output_dir={run}", *options)
        assert done.returncode == 0, done.stderr
        return Job(cluster, run)

    return start


class Job:
    """The job of a run."""

    def __init__(self, cluster: Cluster, run: Path):
        self.cluster, self.run = cluster, run
        self.submission = submissions_of(run)[-1]
        self.name = self.submission.job

    @property
    def step(self) -> int:
        lines = read_metrics(self.run / "metrics.jsonl")
        return lines[-1]["step"] if lines else 0

    @property
    def log(self) -> str:
        """What rank 0 and the job's script printed in all starts."""
        return self.submission.log(self.name).read_text()

    def ranks_printed(self, count: int) -> bool:
        """Whether so many ranks have begun."""
        return (
            len([log for log in self.submission.folder.glob("*.out") if "Loading pickle" in log.read_text()]) == count
        )

    @property
    def restarts(self) -> int:
        return len(self.submission.starts(self.name)) - 1

    def rank_process(self, rank: int) -> int:
        """The id of a rank's process in this start."""
        return self.cluster.ranks(self.name)[rank]

    @contextmanager
    def held_until_told(self, seconds: float = 60) -> Iterator[None]:
        """Stop all ranks where they are until Slurm has sent them USR2: it looks seldom, and the run is short."""
        ranks = self.cluster.ranks(self.name).values()
        for process in ranks:
            os.kill(process, signal.SIGSTOP)
        yield
        deadline = time.monotonic() + seconds  # later than that it was sent before they were stopped
        while not all(map(_is_told, ranks)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in ranks:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)

    @property
    def state(self) -> str:
        return slurm.states(self.name)[self.name].state

    def wait_for(self, condition: Callable[["Job"], bool], seconds: float = 120) -> None:
        """Wait until it holds of this job; fails with all that its ranks printed."""
        deadline = time.monotonic() + seconds
        while not condition(self):
            if time.monotonic() > deadline:
                logs = [path.read_text()[-5000:] for path in sorted(self.submission.folder.glob("*.out"))]
                pytest.fail("\n".join([self.cluster.ask("scontrol", "show", "job", self.name), *logs]))
            time.sleep(0.1)

    def finish(self, seconds: float = 180) -> dict[str, Tensor]:
        """Wait until the run is done; returns the tensors of its last checkpoint."""
        self.wait_for(lambda job: (job.submission.end(job.name) or {}).get("code") == 0, seconds)
        files = sorted(latest_checkpoint(self.run).glob("*.safetensors"))
        return {f"{file.stem}: {name}": tensor for file in files for name, tensor in load_file(file).items()}


def _is_told(process: int) -> bool:
    """Whether USR2 is there for a stopped process, or it is gone."""
    with suppress(OSError):
        (pending,) = re.findall(r"ShdPnd:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
        return bool(int(pending, 16) & 1 << signal.SIGUSR2 - 1)
    return True
