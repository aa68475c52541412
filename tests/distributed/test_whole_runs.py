"""Whole runs end with the same parameters on 1, 2 and 4 processes, under every ZeRO stage, in any micro-batches.

Real data, augmentations, batch norm, momentum and schedule. Every run goes 20 steps from one checkpoint, made by ten
steps from the seed: at the very start a ResNet's embeddings all point the same way, and rounding alone moves VarCon's
gradient by a percent.

What is "the same" in float32? Sums over ranks are taken in another order, so every step differs by a few roundings, and
training enlarges them. How much is measured, not guessed: one process runs again from the checkpoint with every
parameter changed by about one rounding (relative 2**-24). `SLACK` times the distance that this alone makes after 20
steps is the bound; a bound that is not small against the way the parameters went would fail as a test of nothing.
"""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from varscale.engine.checkpoints import read_part, read_state, write_checkpoint
from varscale.engine.metrics import MEASURED

# tests/test_train_runs.py has ViTs on two ranks, and from ZeRO-3 on two to one. To compile C++ takes minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

START, STEPS = 10, 20
SLACK = 4
COMMON = [
    "data.workers=1",
    "batch.global_batch_size=32",
    "schedule.epochs=3",  # of 10 steps
    "compute.precision=float32",
    f"checkpoint.every_steps={START}",
    "checkpoint.keep=3",
    "logging.every_steps=1",
    "logging.trackers=[]",
    "online_knn.every_epochs=0",
]
# Fewer pixels or images would make a ResNet too badly conditioned to compare.
RESNET = ["data.image_size=16", "batch.global_batch_size=64", "schedule.epochs=6"]
VIT = ["encoder.name=vit_ti", "encoder.stem=null", "encoder.patch_size=8", "data.image_size=16"]
SGD = ["optimizer.name=sgd", "optimizer.lr=0.02"]
VSSL = [
    *SGD,
    "data.augmentation=byol",
    "objective.teacher_momentum=0.97",
    "objective.normalise_latents=false",  # it would enlarge the rounding of class tokens that are all but equal
]
KINDS = {
    # At lower rates the embeddings point the same way for longer, and rounding is enlarged tenfold a step.
    "varcon-resnet": ("digits-varcon", [*RESNET, "optimizer.lr=0.05"]),
    "varcon-vit": ("digits-varcon", [*VIT, "optimizer.lr=0.01"]),
    "varcon-vit-bfloat16": ("digits-varcon", [*VIT, "optimizer.lr=0.01", "compute.precision=bfloat16"]),
    "varcon-vit-compiled": (
        "digits-varcon",
        [
            *VIT,
            "compute.compile=true",
            "encoder.activation_checkpointing=true",
            "optimizer={name: lars, lr: 0.5, clip_grad_norm: 0.5}",
        ],
    ),
    "varcon-resnet-compiled": ("digits-varcon", [*RESNET, "compute.compile=true", "optimizer.lr=0.05"]),
    "vssl-resnet": ("digits-vssl", [*RESNET, *VSSL]),
    "vssl-vit": ("digits-vssl", [*VIT, *VSSL]),
    "supcon-vit": ("digits-supcon", [*VIT, "optimizer.lr=0.01"]),
    "simclr-vit": ("digits-simclr", [*VIT, *SGD]),
    "byol-vit": ("digits-byol", [*VIT, *SGD, "data.augmentation=byol", "objective.teacher_momentum=0.97"]),
    "mocov3-vit": ("digits-mocov3", [*VIT, *SGD, "data.augmentation=byol", "objective.teacher_momentum=0.97"]),
    "cross_entropy-vit": ("digits-cross_entropy", [*VIT, "optimizer.lr=0.01"]),
}


class Runs:
    """Runs made when they are first asked for, each in processes of its own."""

    def __init__(self, run_ranks, data: Path, folder: Path):
        self.run_ranks, self.data, self.folder = run_ranks, data, folder

    def run(self, kind: str, world_size: int = 1, *overrides: str, start: Path | None = None) -> Path:
        """The directory of a run of this kind from a checkpoint, or from the seed where there is none."""
        name = "-".join([kind, str(world_size), *(text.partition("=")[2] for text in overrides)])
        run = self.folder / (f"{name}-from-{start.parents[1].name}" if start else name)
        if not run.is_dir():
            recipe, settings = KINDS[kind]
            self.folder.mkdir(exist_ok=True)
            task = [recipe, [*COMMON, f"data.dir={self.data}", *settings, *overrides], start and str(start)]
            (self.folder / "runs.json").write_text(json.dumps({run.name: task}))
            self.run_ranks(Path(__file__).with_name("train_worker.py"), world_size, self.folder, timeout=1200)
        return run

    def reference(self, kind: str) -> Path:
        """One process, from the seed."""
        return self.run(kind)

    def continued(self, kind: str, world_size: int, *overrides: str) -> Path:
        """From the reference's middle to its end, on so many processes."""
        return self.run(kind, world_size, *overrides, start=checkpoint(self.reference(kind), START))

    def rounded(self, kind: str) -> Path:
        """From the reference's middle to its end, but for a rounding at the beginning."""
        perturbed = self.folder / f"perturbed-{kind}"
        if not perturbed.is_dir():
            perturb(checkpoint(self.reference(kind), START), perturbed)
        return self.run(kind, start=checkpoint(perturbed, START))

    def bound(self, kind: str) -> float:
        """The largest distance from the reference's end that rounding explains."""
        reference = self.reference(kind)
        limit = SLACK * distance(parameters(self.rounded(kind)), parameters(reference))
        moved = distance(parameters(reference, START), parameters(reference))
        assert limit < 0.25 * moved, f"{kind}: rounding alone makes {limit / moved:.1%} of the way: no test of anything"
        return limit

    def check(self, kind: str, world_size: int, *overrides: str) -> Path:
        """Assert that a continued run ends where the reference does; returns its directory."""
        run = self.continued(kind, world_size, *overrides)
        assert distance(parameters(run), parameters(self.reference(kind))) < self.bound(kind)
        return run


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def parameters(run: Path, step: int = START + STEPS) -> dict[str, torch.Tensor]:
    """In float64, without the buffers."""
    tensors = load_file(checkpoint(run, step) / "model.safetensors")
    return {key: tensor.double() for key, tensor in tensors.items() if not is_buffer(key)}


def metrics(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "train" and line["step"] > START]


def first_values(lines: list[dict]) -> dict[str, float]:
    """The numbers in the first of some lines, the speed and time of day aside."""
    left_out = ("kind", "time", "tau2_histogram", *MEASURED)
    return {key: value for key, value in lines[0].items() if key not in left_out}


def is_buffer(key: str) -> bool:
    return "running_" in key or key.endswith("num_batches_tracked")


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Euclidean, over all parameters."""
    assert first.keys() == second.keys()
    return math.sqrt(sum(float((first[key] - second[key]).square().sum()) for key in first))


def perturb(checkpoint: Path, run: Path) -> None:
    """A copy of `checkpoint` in another run, with every parameter changed by about one rounding."""
    generator = torch.Generator().manual_seed(0)
    parts = {path.stem: read_part(checkpoint, path.stem) for path in checkpoint.glob("*.safetensors")}
    for key, tensor in parts["model"].items():
        if not is_buffer(key):
            tensor.mul_(1 + 2.0**-24 * torch.randn(tensor.shape, generator=generator))
    write_checkpoint(run, START, parts, read_state(checkpoint)["state"], keep=1)


@pytest.fixture(scope="module")
def runs(run_ranks, digits, tmp_path_factory) -> Runs:
    return Runs(run_ranks, digits, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    ("kind", "world_size"),
    product(KINDS, (2, 4)),
)
def test_the_number_of_ranks_changes_nothing_but_rounding(runs, kind, world_size):
    ours, theirs = metrics(runs.check(kind, world_size)), metrics(runs.reference(kind))
    assert [line["lr"] for line in ours] == [line["lr"] for line in theirs]
    # The first step, from the same parameters: batch, views, batch norm, class statistics, loss and all that is logged.
    rounded, tolerance = first_values(metrics(runs.rounded(kind))), 5e-3 if "bfloat16" in kind else 2e-5
    for key, value in first_values(theirs).items():
        limit = SLACK * abs(rounded[key] - value)
        assert first_values(ours)[key] == pytest.approx(value, rel=tolerance, abs=limit), key
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=5e-4 if "bfloat16" in kind else 1e-6)
    if kind in ("varcon-vit", "varcon-resnet"):
        assert ours[0]["tau2_histogram"] == theirs[0]["tau2_histogram"]


@pytest.mark.parametrize(
    ("kind", "zero"),
    product(("varcon-resnet", "vssl-resnet"), ("zero1", "zero2", "zero3", "zero3_offload")),
)
def test_the_zero_stage_changes_nothing_but_rounding(runs, kind, zero):
    runs.check(kind, 2, f"deepspeed.config={zero}")


@pytest.mark.parametrize(
    ("kind", "before", "world_size", "zero"),
    [
        ("varcon-vit", "zero0", 4, "zero2"),
        ("varcon-vit", "zero3", 1, "zero0"),
        ("vssl-resnet", "zero3", 1, "zero0"),
        ("vssl-resnet", "zero3", 4, "zero1"),
    ],
)
def test_a_run_that_goes_on_on_other_ranks_ends_the_same_but_for_rounding(runs, kind, before, world_size, zero):
    """Two ranks take steps 11 to 20, others steps 21 to 30; the order of the data goes on where it was."""
    middle = checkpoint(runs.continued(kind, 2, f"deepspeed.config={before}"), 2 * START)
    moved = runs.run(kind, world_size, f"deepspeed.config={zero}", start=middle)
    assert [line["step"] for line in metrics(moved)] == list(range(2 * START + 1, START + STEPS + 1))
    assert distance(parameters(moved), parameters(runs.reference(kind))) < runs.bound(kind)


@pytest.mark.parametrize(
    ("kind", "micro_batches"),
    product(("varcon-vit", "varcon-vit-compiled", "supcon-vit", "simclr-vit"), (2, 4)),
)
def test_micro_batches_change_nothing_but_rounding_without_batch_norm(runs, kind, micro_batches):
    overrides = [f"batch.gradient_accumulation_steps={micro_batches}", "deepspeed.config=zero2"]
    ours, theirs = metrics(runs.check(kind, 2, *overrides)), metrics(runs.reference(kind))
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-6)
    if kind == "varcon-vit":
        assert [line["classes_present"] for line in ours] == [line["classes_present"] for line in theirs]
