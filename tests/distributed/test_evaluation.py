"""Evaluation on two real processes gives what one gives: as a program, and as a function within another program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import nn

from varscale.config import load_config
from varscale.data.augment import Augmentation
from varscale.data.conversion import convert
from varscale.data.geometry import CropSpec
from varscale.data.loader import ViewLoader
from varscale.data.sources import open_source
from varscale.encoder.runs import new_encoder, trained_encoder
from varscale.engine.checkpoints import write_checkpoint
from varscale.engine.manifest import write_manifest
from varscale.evaluate import main
from varscale.evaluation.features import extract_features
from varscale.evaluation.knn import knn_accuracy
from varscale.models.heads import ProjectionHead

TRAIN, VAL = 61, 31  # nothing divides them


def measure(run: Path, data: Path, rank: int, world_size: int) -> dict:
    """What a training program does: features from the network as it stands, without accelerate."""
    encoder, _, _ = trained_encoder(run)
    where = {"rank": rank, "world_size": world_size, "device": torch.device("cpu")}
    normalise = Augmentation("none", 1, 8, (0.5,) * 3, (0.2,) * 3, seed=0)
    found = {}
    for split in ("train", "val"):
        loader = ViewLoader(data / f"{split}.beton", [CropSpec(8, None)], seed=0, workers=1)
        found[split] = extract_features(encoder, loader, normalise, batch_size=8, **where)
    return found["val"]._asdict() | knn_accuracy(found["train"], found["val"], 3, k=(5,), **where)


def work(run: Path, data: Path, out: Path) -> None:
    """One rank, in a gloo group as DeepSpeed makes one on a machine without a GPU."""
    dist.init_process_group("gloo")
    threads = torch.get_num_threads()
    torch.save(measure(run, data, dist.get_rank(), dist.get_world_size()), out / f"{dist.get_rank()}.pt")
    assert torch.get_num_threads() == threads
    dist.destroy_process_group()


def make_run(folder: Path, recipe: str, size: int, head: nn.Module) -> dict[str, np.ndarray]:
    """A data set of images of so many pixels a side and a run with one checkpoint in `folder`; returns the images."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", TRAIN), ("test", VAL)):
        labels = np.arange(count) % 3
        images = 20 * labels[:, None, None, None] + random.integers(0, 210, (count, size, size, 3))
        arrays |= {f"x_{split}": images.astype(np.uint8), f"y_{split}": labels}
    np.savez(folder / "a.npz", **arrays)
    info = convert(open_source(f"npz:{folder / 'a.npz'}"), folder / "data").info
    overrides = [f"output_dir={folder / 'run'}", f"data.dir={folder / 'data'}", f"data.image_size={size}"]
    config = load_config(recipe, overrides)
    write_manifest(config, {}, info.digest, world_size=1, device="cpu")
    parts = {"encoder": new_encoder(config), "head": head}
    tensors = {f"{part}.{key}": value for part, module in parts.items() for key, value in module.state_dict().items()}
    write_checkpoint(folder / "run", 1, {"model": tensors}, {}, keep=1)
    return arrays


@pytest.fixture(scope="module")
def run_and_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("distributed")
    arrays = make_run(folder, "digits-varcon", 8, ProjectionHead(512))
    (folder / "corrupted").mkdir()
    noisy = np.concatenate([arrays["x_test"] // (severity + 1) for severity in range(1, 6)])
    np.save(folder / "corrupted" / "contrast.npy", noisy)
    np.save(folder / "corrupted" / "labels.npy", np.tile(arrays["y_test"], 5))
    return folder / "run", folder / "data"


def execute(*command: object) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def torchrun(free_port):
    return ["torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port()]


def metrics(run: Path) -> dict[str, dict]:
    found = json.loads((run / "evaluation" / "step-00000001.json").read_text())["results"]
    return {one["evaluator"]: one for one in found}


def test_two_processes_print_once_and_measure_what_one_does(run_and_data, torchrun):
    run, _ = run_and_data
    arguments = ["--checkpoint", run, "knn", "linear", "linear_cached", "knn.k=[5]", "--batch-size", 8]
    arguments += ["linear.epochs=20", "linear.lr=1.0", "--no-cache"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(argument) for argument in arguments]) == 0
    alone = metrics(run)
    printed = execute(*torchrun, "-m", "varscale.evaluate", *arguments)
    together = metrics(run)
    assert {one["world_size"] for one in together.values()} == {2}
    for name in ("knn", "linear", "linear_cached"):
        assert together[name]["metrics"] == alone[name]["metrics"]
    assert printed.count("written to") == 1
    # An accuracy at chance or at 100 would agree whatever went wrong.
    assert 40 < alone["knn"]["metrics"]["top1_k5"] < 100
    assert 40 < alone["linear"]["metrics"]["top1"] < 100


def test_all_other_evaluators_measure_on_two_processes_what_they_do_on_one(run_and_data, torchrun):
    run, data = run_and_data
    names = ["few_shot", "clustering", "transfer", "corruption", "calibration", "alignment_uniformity", "dispersion"]
    arguments = ["--checkpoint", run, *names, "embedding_plot", "--batch-size", 8, "--workers", 1, "--no-cache"]
    arguments += ["few_shot.seeds=2", "few_shot.percent=[20]", f"transfer.data={data}", "transfer.epochs=2"]
    arguments += [f"corruption.dir={data.with_name('corrupted')}", "embedding_plot.methods=[pca]"]
    execute("varscale.evaluate", *arguments)
    alone = metrics(run)
    execute(*torchrun, "-m", "varscale.evaluate", *arguments)
    together = metrics(run)
    for name in (*names, "embedding_plot"):
        assert together[name]["world_size"] == 2
        assert together[name]["metrics"] == pytest.approx(alone[name]["metrics"], rel=1e-4, abs=1e-6, nan_ok=True), name
    assert 40 < alone["corruption"]["metrics"]["clean_knn"] < 100


@pytest.mark.slow
def test_two_processes_corrupt_and_classify_as_one_does(torchrun, tmp_path):
    make_run(tmp_path, "digits-cross_entropy", 32, nn.Linear(512, 3))
    arguments = ["--checkpoint", tmp_path / "run", "classifier", "corruption", "--batch-size", 8, "--workers", 1]
    arguments += ["--no-cache", "corruption.names=[gaussian_noise,contrast]", "corruption.samples=23"]
    execute("varscale.evaluate", *arguments)
    alone = metrics(tmp_path / "run")
    execute(*torchrun, "-m", "varscale.evaluate", *arguments)
    together = metrics(tmp_path / "run")
    for name in ("classifier", "corruption"):
        assert together[name]["world_size"] == 2
        assert together[name]["metrics"] == alone[name]["metrics"]
    assert together["corruption"]["details"] == alone["corruption"]["details"]
    assert 0 < alone["classifier"]["metrics"]["top1"] < 100


@pytest.mark.slow
def test_two_processes_take_what_one_has_kept(run_and_data, torchrun):
    run, _ = run_and_data
    arguments = ["--checkpoint", run, "dispersion", "alignment_uniformity", "--batch-size", 8]
    execute("varscale.evaluate", *arguments)
    alone, kept = metrics(run), sorted((run / "evaluation" / "features").iterdir())
    made = [path.stat().st_mtime_ns for path in kept]
    execute(*torchrun, "-m", "varscale.evaluate", *arguments)
    assert [path.stat().st_mtime_ns for path in kept] == made
    assert len(kept) == 4
    for name in ("dispersion", "alignment_uniformity"):
        assert metrics(run)[name]["metrics"] == alone[name]["metrics"]


def test_features_in_a_process_group_of_the_program_are_those_of_one_process(run_and_data, torchrun, tmp_path):
    run, data = run_and_data
    execute(*torchrun, __file__, run, data, tmp_path)
    alone = measure(run, data, 0, 1)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)
    assert alone["indices"].tolist() == list(range(VAL))
    assert 40 < alone["top1_k5"] < 100


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
