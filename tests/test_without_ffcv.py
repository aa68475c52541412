"""Conversion, verification, training, evaluation and use of the encoder where FFCV is not installed."""

import os
import subprocess
import sys
import textwrap

import pytest

HIDE_FFCV = """
    import importlib.util, sys

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "ffcv":
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Hidden())
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "ffcv" else find(name, package)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, repository):
    """Run a program of the project in a Python that finds no FFCV."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(textwrap.dedent(HIDE_FFCV))

    def call(*command: object):
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=repository,
            env=os.environ | {"PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return call


def test_everything_works_with_torchs_decoder(run, small_run, tmp_path):
    data, trained = tmp_path / "digits", tmp_path / "run"
    done = run("tools/convert_dataset.py", "--verify", "digits", data, "--image-size", 16)
    assert done.returncode == 0, done.stderr
    assert "verified 1,797 images" in done.stdout
    train = ["varscale/train.py", "--config", "digits-varcon", *small_run, f"data.dir={data}", "schedule.epochs=1"]
    train += [f"output_dir={trained}", "online_knn.every_epochs=1", "schedule.warmup_epochs=0"]
    refused = run(*train)
    assert refused.returncode == 2
    assert "FFCV is not installed" in refused.stderr.splitlines()[-1]
    assert "data.loader=torch" in refused.stderr.splitlines()[-1]
    done = run(*train, "data.loader=torch")
    assert done.returncode == 0, done.stderr
    done = run("-m", "varscale.evaluate", "--checkpoint", trained, "--data", data, "knn")
    assert done.returncode == 0, done.stderr
    assert "written to" in done.stdout
    nearest = ["--data", data, "--query", "0", "--k", 3, "--out", tmp_path / "nearest.png"]
    done = run("tools/nearest_images.py", "--checkpoint", trained, *nearest)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("validation 0 (")
