"""An experiment as a job array under Slurm, measured once its runs are done."""

import subprocess
import sys

import pytest

from varscale.cluster import watching
from varscale.cluster.submission import submissions_of
from varscale.engine.rundir import read_manifest


@pytest.mark.slow
def test_an_experiment_is_submitted_and_measured_when_it_is_done(cluster, repository, small_run, digits, tmp_path):
    settings = [one for one in small_run if not one.startswith("data.dir=")]
    arguments = ["terms", "--only", "KL alone", "NLL alone", "--data", digits, "--out", tmp_path, "--set", *settings]

    def experiment(*more):
        command = [sys.executable, "tools/experiment.py", *arguments, *more]
        return subprocess.run(
            list(map(str, command)),
            cwd=repository,
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = experiment("--submit", "--nodes", 1, "--time", 10)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "terms-smoke"
    (submission,) = submissions_of(folder)
    assert len(submission.jobs) == 2
    waiting = experiment()
    assert (waiting.returncode, "is at its runs" in waiting.stderr) == (2, True)
    cluster.wait_for(lambda: all(one.is_over for one in watching.states(submission)), 180, "for the runs to end")

    done = experiment()
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in (folder / "table.md").read_text().splitlines()[3:] if line]
    assert rows[-2:] == ["KL alone", "NLL alone"]
    manifests = [read_manifest(folder / f"{name}-seed0") for name in ("KL_alone", "NLL_alone")]
    assert [len(one["starts"]) for one in manifests] == [1, 1], "what Slurm has trained is not trained again"
    assert [one["config"]["objective"]["nll_weight"] for one in manifests] == [0, 1]
