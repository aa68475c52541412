"""A rank that fails ends the others within seconds, and its own error is what a person reads."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from betons import damage
from PIL import Image

from varscale.data.conversion import convert
from varscale.data.sampling import epoch_order
from varscale.data.sources import open_source

IMAGES, BATCH = 96, 32
PATIENCE = 300  # seconds, of which all but a few go into starting


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A data set of JPEG files, and what is said of the one that cannot be decoded; rank 1 meets it in step 2."""
    folder = tmp_path_factory.mktemp("damaged")
    random = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 4)):
        for index in range(count):
            path = folder / "images" / split / f"class {index % 2}" / f"{index:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    convert(open_source(f"imagefolder:{folder / 'images'}"), folder / "data")
    sample = int(epoch_order(IMAGES, 0, 0)[2 * BATCH - 1])
    beton = folder / "data" / "train.beton"
    damage(beton, sample)
    name = (folder / "data" / "train.names.txt").read_text().splitlines()[sample]
    return folder / "data", f"{beton}: sample {sample} ({name}) cannot be loaded"


@pytest.fixture
def command(damaged, small_run, tmp_path):
    data, _ = damaged
    overrides = [*small_run, f"data.dir={data}", f"batch.global_batch_size={BATCH}", f"output_dir={tmp_path / 'run'}"]
    return ["varscale/train.py", "--config", "digits-varcon", *overrides]


def test_under_a_launcher(launch, command, damaged):
    start = time.monotonic()
    done = launch(*command, launcher="deepspeed", timeout=2 * PATIENCE)
    assert time.monotonic() - start < PATIENCE
    assert done.returncode != 0
    assert f"error: {damaged[1]}" in done.stderr


@pytest.fixture
def alone(repository, free_port):
    """Run two ranks without a launcher; returns their exit codes and what they said on stderr."""

    def run(*commands):
        environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = [
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=repository,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, command in enumerate(commands)
        ]
        try:
            said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [process.returncode for process in processes], said

    return run


def test_without_a_launcher_that_ends_the_others(alone, command, damaged):
    codes, said = alone(command, command)
    assert codes == [1, 2]
    assert damaged[1] in said[1].splitlines()[-1]
    assert said[0].splitlines()[-1].startswith("error: another rank failed: rank 1: ")
    assert damaged[1] in said[0].splitlines()[-1]
    assert "Traceback" not in said[0] + said[1]


def test_a_users_mistake_on_one_node_alone(alone, command):
    # The file is gone on the second node once everything has been checked.
    lacks = "from varscale.data import loader; from varscale import train; from varscale.errors import UserError; "
    lacks += "loader.check_beton = lambda *_, **__: (_ for _ in ()).throw(UserError('this node lacks it')); "
    codes, said = alone(command, ["-c", f"{lacks}raise SystemExit(train.main())", *command[1:]])
    assert codes == [1, 2]
    assert said[0].splitlines()[-1] == "error: another rank failed: rank 1: this node lacks it"
    assert said[1].splitlines()[-1] == "error: this node lacks it"
    assert "Traceback" not in said[0] + said[1]


@pytest.mark.parametrize("loader", ["ffcv", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_bad_sample_is_skipped_where_asked_for(launch, command, damaged, tmp_path, loader):
    options = ["data.on_bad_sample=skip", f"data.loader={loader}", "data.augmentation=stacked_randaugment"]
    options += ["online_knn.every_epochs=1", "online_knn.k=5"]  # which reads all training images once more
    done = launch(*command, *options, launcher="python")
    assert done.returncode == 0, done.stderr
    assert f"warning: {damaged[1]}" in done.stderr
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    lines = [line for line in lines if line["kind"] == "train"]
    epochs = lines[-1]["step"] // (IMAGES // BATCH)
    assert sum(line["bad_sample_count"] for line in lines) == epochs > 0
