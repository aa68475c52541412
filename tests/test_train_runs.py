"""Whole runs of train.py as a user starts them: by python, deepspeed and torchrun, on one and two ranks, resumed."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from varscale.engine.checkpoints import read_state

STEPS = 10  # 2 epochs of 5


def final_tensors(run, part="model"):
    return load_file(run / "checkpoints" / f"step-{STEPS:08d}" / f"{part}.safetensors")


def metrics(run, kind="train"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(run):
    return [line["loss"] for line in metrics(run)]


def largest_difference(run, other, part="model"):
    ours, theirs = final_tensors(run, part), final_tensors(other, part)
    assert ours.keys() == theirs.keys()
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def train(launch, small_run, runs):
    def call(recipe, name, *overrides, launcher="python", resume=(), say=False):
        done = launch(
            "varscale/train.py", "--config", recipe, *small_run, *overrides, f"output_dir={runs / name}", *resume,
            launcher=launcher,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout if say else runs / name

    return call


KEEP = ("checkpoint.every_steps=6",)
PAIR = ("deepspeed.config=zero2", "batch.gradient_accumulation_steps=2")


@pytest.fixture(scope="module")
def varcon_alone(train):
    return train("digits-varcon", "varcon-alone", *KEEP, "online_knn.every_epochs=1", "logging.trackers=[tensorboard]")


# Without batch norm and its kinks, one process and several agree to rounding. A ResNet's first gradients are so badly
# conditioned (all embeddings point the same way) that float32 rounding alone moves them by a percent.
VIT = ("encoder.name=vit_ti", "encoder.stem=null", "encoder.patch_size=8", "optimizer.lr=0.02")
# A ViT's class tokens are all but equal at the start, and normalising their latents would enlarge rounding.
VSSL = (*VIT, "optimizer.name=lars", "optimizer.lr=0.5", "objective.normalise_latents=false")


@pytest.fixture(scope="module")
def vit_alone(train):
    return train("digits-varcon", "vit-alone", *VIT)


@pytest.fixture(scope="module")
def vit_pair(train):
    return train("digits-varcon", "vit-pair", *VIT, *KEEP, *PAIR, launcher="deepspeed")


@pytest.fixture(scope="module")
def vssl_alone(train):
    return train("digits-vssl", "vssl-alone", *VSSL)


def test_a_run_leaves_what_a_person_looks_for(varcon_alone):
    manifest = json.loads((varcon_alone / "manifest.json").read_text())
    assert manifest["config"]["name"] == "digits-varcon"
    assert manifest["seed"] == 0
    assert len(manifest["data_digest"]) == 64
    (start,) = manifest["starts"]
    assert start["world_size"] == 1
    assert {"torch", "deepspeed", "ffcv", "python"} <= start["versions"].keys()
    assert start["hardware"]["cores"] > 0
    assert list((varcon_alone / "tensorboard").glob("events.*"))
    assert (varcon_alone / "config.yaml").read_text().startswith("name: digits-varcon")

    lines = metrics(varcon_alone)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    wanted = {"loss", "kl", "nll", "tau2", "tau2_std", "confidence", "classes_present", "lr", "gradient_norm"}
    assert wanted <= lines[0].keys()
    for line in lines:
        assert line["loss"] == pytest.approx(line["kl"] + line["nll"], abs=1e-5)
        assert 0.08 <= line["tau2"] <= 0.12
        assert line["classes_present"] == 10
        assert sum(line["tau2_histogram"]) == 128
        centres = np.linspace(0.08, 0.12, len(line["tau2_histogram"]) * 2 + 1)[1::2]
        half_a_bin = 0.02 / len(centres)
        assert np.average(centres, weights=line["tau2_histogram"]) == pytest.approx(line["tau2"], abs=half_a_bin)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert [line["epoch"] for line in metrics(varcon_alone, "knn")] == [1, 2]


def test_two_ranks_zero_2_and_accumulation_are_one_process_to_rounding(vit_alone, vit_pair):
    """How far rounding may grow later in a run is measured in tests/distributed/test_whole_runs.py."""
    for ours, theirs, bound in zip(metrics(vit_pair), metrics(vit_alone), (1e-6, 1e-4, 1e-3), strict=False):
        for name in ("loss", "kl", "nll", "tau2", "confidence", "gradient_norm", "lr"):
            assert ours[name] == pytest.approx(theirs[name], rel=bound), (ours["step"], name)
    assert metrics(vit_alone)[-1]["loss"] < 0.9 * metrics(vit_alone)[0]["loss"]


def test_batch_norm_sees_the_global_batch(train, varcon_alone):
    pair = train("digits-varcon", "varcon-pair", "deepspeed.config=zero1", launcher="torchrun")
    ours, theirs = metrics(pair)[0], metrics(varcon_alone)[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=0.02)


@pytest.mark.parametrize("launcher", ["python", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_resuming_from_the_middle_gives_the_same_end(train, varcon_alone, vit_pair, runs, launcher):
    origin, overrides = (varcon_alone, ()) if launcher == "python" else (vit_pair, (*VIT, *PAIR))
    again = runs / f"again-{launcher}"
    shutil.copytree(origin, again, symlinks=True)
    shutil.rmtree(again / "checkpoints" / f"step-{STEPS:08d}")
    train("digits-varcon", again.name, *KEEP, *overrides, launcher=launcher, resume=("--resume", "auto"))
    for part in ("model", "optimizer"):
        assert largest_difference(again, origin, part) == 0, f"{part} differs: the resumed run is not bit-exact"
    steps = [line["step"] for line in metrics(again)]
    assert steps == list(range(1, STEPS + 1)), "the metrics of repeated steps must not stand twice"
    assert len(json.loads((again / "manifest.json").read_text())["starts"]) == 2


def test_vssl_under_zero_3_on_two_ranks_resumes_on_one_under_zero_0(train, vssl_alone):
    # The projector's batch norm divides by the small differences between class tokens and so enlarges rounding: losses
    # agree to 1e-9 at first and to a few 1e-3 later. A lost momentum or teacher shows at once.
    pair = train("digits-vssl", "vssl-pair", *VSSL, *KEEP, "deepspeed.config=zero3", launcher="deepspeed")
    assert {"cosine", "logvar_mean", "logvar_min", "logvar_max", "spread"} <= metrics(pair)[0].keys()
    assert losses(pair)[:2] == pytest.approx(losses(vssl_alone)[:2], rel=1e-6)
    assert losses(pair) == pytest.approx(losses(vssl_alone), rel=1e-2)

    middle = pair / "checkpoints" / "step-00000006"
    alone = train("digits-vssl", "vssl-elastic", *VSSL, resume=("--resume", str(middle)))
    assert [line["step"] for line in metrics(alone)] == [7, 8, 9, 10]
    assert losses(alone)[0] == pytest.approx(losses(pair)[6], rel=1e-4)
    assert losses(alone) == pytest.approx(losses(pair)[6:], rel=1e-2)
    for part in ("model", "teacher", "optimizer"):
        ours, theirs = final_tensors(alone, part), final_tensors(pair, part)
        assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_the_teacher_follows_the_student(vssl_alone):
    student, teacher = final_tensors(vssl_alone), final_tensors(vssl_alone, "teacher")
    name = "encoder.conv_proj.weight"
    moved = (student[name] - teacher[f"network.{name}"]).abs().max()
    assert 0 < moved < student[name].abs().max()
    assert torch.equal(student["projector.1.running_mean"], teacher["network.projector.1.running_mean"])


def test_resume_refuses_another_configuration(launch, small_run, varcon_alone):
    def refused(recipe, *overrides):
        done = launch(
            "varscale/train.py", "--config", recipe, *small_run, *overrides, f"output_dir={varcon_alone}",
            "--resume", "auto",
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "encoder.name is 'resnet18' there, 'resnet34' now" in refused("digits-varcon", "encoder.name=resnet34")
    assert "objective" in refused("digits-vssl")
    assert "seed is 0 there, 1 now" in refused("digits-varcon", "seed=1")


def test_a_damaged_checkpoint_that_was_asked_for_is_named(launch, small_run, varcon_alone, runs):
    damaged = runs / "damaged"
    shutil.copytree(varcon_alone, damaged, symlinks=True)
    checkpoint = damaged / "checkpoints" / f"step-{STEPS:08d}"
    model = checkpoint / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    done = launch(
        "varscale/train.py", "--config", "digits-varcon", *small_run, f"output_dir={runs / 'other'}",
        "--resume", checkpoint,
    )  # fmt: skip
    assert done.returncode == 2
    assert "model.safetensors: is damaged" in done.stderr.splitlines()[-1]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(train, varcon_alone, runs):
    again = runs / "fallen-back"
    shutil.copytree(varcon_alone, again, symlinks=True)
    newest = (again / "checkpoints" / "latest").resolve()
    (newest / "optimizer.safetensors").unlink()
    said = train("digits-varcon", again.name, *KEEP, "online_knn.every_epochs=1", resume=("--resume", "auto"), say=True)
    assert "optimizer.safetensors: is missing from the checkpoint; going on from the checkpoint before it" in said
    assert (newest.parent / f"damaged-{newest.name}").is_dir()
    for part in ("model", "optimizer"):
        assert largest_difference(again, varcon_alone, part) == 0
    assert [line["step"] for line in metrics(again)] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in metrics(again, "knn")] == [1, 2]


@pytest.mark.parametrize("recipe", ["digits-varcon", pytest.param("digits-vssl", marks=pytest.mark.slow)])
def test_multi_crop(train, recipe):
    local = ["data.local_views=3", "data.local_size=8", "data.local_scale=[0.2, 0.5]", "schedule.epochs=2"]
    assert len(losses(train(recipe, f"multi-crop-{recipe}", *local))) == STEPS


def test_a_classifier_learns_from_single_views(train):
    run = train("digits-cross_entropy", "classifier", "online_knn.every_epochs=2")
    lines = metrics(run)
    assert all(0 <= line["top1"] <= 100 for line in lines)
    assert lines[-1]["top1"] > lines[0]["top1"]
    assert final_tensors(run)["head.weight"].shape == (10, 512)


def test_a_loss_that_is_not_finite_stops_the_run(launch, small_run, runs):
    run = runs / "nonfinite"
    done = launch(
        "varscale/train.py", "--config", "digits-varcon", *small_run, f"output_dir={run}", "checkpoint.every_steps=1",
        "optimizer.lr=1e20", "schedule.warmup_epochs=0", "schedule.warmup_start_lr=0",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    report = json.loads(next(run.glob("bad-step-*.json")).read_text())
    assert "stopped: step" in done.stderr.splitlines()[-1]
    (rank,) = report["ranks"]
    assert len(rank["samples"][0]) == 64
    newest = (run / "checkpoints" / "latest").resolve()
    assert int(newest.name.removeprefix("step-")) < report["step"]
    assert all(t.isfinite().all() for t in load_file(newest / "model.safetensors").values())


@pytest.fixture
def interrupted(small_run, runs, repository):
    """A function: start a run, wait until `begun` of its process says so, press Ctrl-C, return its code and words."""

    def call(name, begun):
        command = ["varscale/train.py", "--config", "digits-varcon", *small_run, f"output_dir={runs / name}"]
        process = subprocess.Popen(
            [sys.executable, *command, "schedule.epochs=500"],
            cwd=repository,
            stderr=subprocess.PIPE,
            text=True,
            # Started in the background, a process ignores the signal.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            while process.poll() is None and not begun(process):
                time.sleep(0.05)
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
        assert time.monotonic() - start < 30
        return process.returncode, said

    return call


def test_ctrl_c_ends_a_run_within_seconds(interrupted, runs):
    run = runs / "interrupted"
    code, said = interrupted(run.name, lambda _: (run / "metrics.jsonl").exists() and metrics(run))
    assert code == 130, said
    assert "SIGINT: stopping after this step; again in 3 s: at once\n" in said
    assert said.splitlines()[-1] == "stopped by SIGINT; the same command with --resume auto goes on"
    assert metrics(run)[-1]["step"] == read_state((run / "checkpoints" / "latest").resolve())["step"]


def test_ctrl_c_in_the_set_up_ends_it_without_a_traceback(interrupted):
    def loads_torch(process):
        return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()

    code, said = interrupted("interrupted early", loads_torch)
    assert code == 130, said
    assert said.splitlines()[-1] == "interrupted before the first step; the same command with --resume auto begins"
    assert "Traceback" not in said


def test_the_script_does_not_shadow_other_packages(launch):
    code = """
        import runpy, sys
        sys.argv, sys.path[0] = ["train.py"], "varscale"
        runpy.run_path("varscale/train.py", run_name="not main")
        print([path for path in sys.path if path.endswith("varscale")])
    """
    assert launch("-c", textwrap.dedent(code)).stdout.strip() == "[]"


def test_dry_run_needs_no_launcher_and_trains_nothing(launch, small_run, runs):
    done = launch(
        "varscale/train.py", "--config", "digits-varcon", *small_run, f"output_dir={runs / 'dry'}", "--dry-run",
        "--world-size", 4, "deepspeed.config=zero3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in (
        "global_batch_size: 64",
        '"train_micro_batch_size_per_gpu": 16',
        "64 images a step = micro batch 16 x accumulation 1 x world size 4",
        "320 images = 5 steps an epoch",
        "11,", "backward ",
    ):  # fmt: skip
        assert text in done.stdout
    assert not (runs / "dry").exists()
