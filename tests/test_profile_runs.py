"""Real runs tell how fast they were, and with --profile where a step's time went: by python, and on two ranks."""

import gzip
import json

import pytest
import torch

STEPS = 10  # 2 epochs of 5, with a checkpoint after each
ALWAYS = {"data wait", "copy", "augment", "forward", "loss", "backward", "optimizer", "logging", "checkpoint", "other"}


@pytest.fixture(scope="module")
def profiled(launch, small_run, tmp_path_factory):
    """A function: run a recipe with --profile; returns its directory and what was printed."""

    def call(recipe, *overrides, launcher="python"):
        run = tmp_path_factory.mktemp("profiled") / recipe
        command = ["varscale/train.py", "--config", recipe, *small_run, *overrides, f"output_dir={run}", "--profile"]
        done = launch(*command, launcher=launcher)
        assert done.returncode == 0, done.stdout + done.stderr
        return run, done.stdout

    return call


@pytest.fixture(scope="module")
def varcon(profiled):
    return profiled("digits-varcon")


@pytest.fixture(scope="module")
def vssl_pair(profiled):
    small = ["encoder.name=vit_ti", "encoder.stem=null", "encoder.patch_size=16", "objective.projector_hidden=64"]
    return profiled("digits-vssl", *small, "deepspeed.config=zero2", launcher="torchrun")


def train_lines(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def step_milliseconds(run, rank=0):
    """The mean duration of the profiler's steps in a rank's trace."""
    with gzip.open(run / "profile" / f"trace-rank-{rank}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = [event["dur"] for event in events if event["name"].startswith("ProfilerStep#") and event["ph"] == "X"]
    assert len(steps) == 6
    return sum(steps) / 6e3


def test_every_line_of_metrics_tells_the_speed(varcon):
    lines = train_lines(varcon[0])
    assert len(lines) == STEPS
    for line in lines:
        assert line["views_per_second"] == pytest.approx(2 * line["images_per_second"])
        assert 0 < line["step_ms_p50"] <= line["step_ms_p90"] <= line["step_ms_max"]
        assert line["images_per_second"] == pytest.approx(64e3 / line["step_ms_max"]), "a line tells of one step here"
        assert 0 <= line["data_wait_share"] <= 1
        assert line["process_memory_peak_gib"] > 0.1
    operations = [line["tflops"] / line["images_per_second"] for line in lines]
    assert operations == pytest.approx([operations[0]] * STEPS), "operations of an image do not change"
    memory = [line["process_memory_peak_gib"] for line in lines]
    assert memory == pytest.approx(sorted(memory), abs=1e-3)  # Linux adds up what threads hold only roughly


def test_the_run_goes_on_as_usual(varcon):
    run, said = varcon
    assert (run / "checkpoints" / "latest").resolve().name == f"step-{STEPS:08d}"
    table = (run / "profile" / "profile.md").read_text()
    assert table.rstrip() in said
    assert (run / "profile" / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_the_manifest_tells_the_peak_that_mfu_is_a_share_of(varcon):
    (start,) = json.loads((varcon[0] / "manifest.json").read_text())["starts"]
    peak = start["hardware"]["peak"]
    assert all(("mfu" in line) == (peak is not None) for line in train_lines(varcon[0]))
    assert peak is None or start["hardware"]["device"] != "cpu"


def test_phases_of_varcon_add_up_to_the_step(varcon):
    found = json.loads((varcon[0] / "profile" / "profile.json").read_text())
    assert found["host"].keys() >= ALWAYS
    assert {"teacher forward", "EMA"}.isdisjoint(found["host"])
    assert all(milliseconds > 0 for milliseconds in found["host"].values())
    assert sum(found["host"].values()) == pytest.approx(found["step_ms"])
    assert found["step_ms"] == pytest.approx(step_milliseconds(varcon[0]), rel=0.02)
    assert found["host"]["other"] < 0.2 * found["step_ms"], "what has no name should be little"
    assert len(found["operators"]) == 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_and_idle_time_of_a_gpu_add_up(varcon):
    found = json.loads((varcon[0] / "profile" / "profile.json").read_text())
    assert {"augment", "forward", "loss", "backward", "optimizer", "idle"} <= found["device"].keys()
    assert sum(found["device"].values()) == pytest.approx(found["device_step_ms"])
    assert found["device_step_ms"] == pytest.approx(found["step_ms"], rel=0.3), "the device keeps up with the host"
    assert all(line["device_memory_peak_gib"] > 0 for line in train_lines(varcon[0]))


@pytest.mark.slow
def test_two_ranks_with_a_teacher(vssl_pair):
    run, said = vssl_pair
    found = json.loads((run / "profile" / "profile.json").read_text())
    assert ALWAYS | {"teacher forward", "EMA", "reduce"} <= found["host"].keys()
    assert found["step_ms"] == pytest.approx(step_milliseconds(run), rel=0.02)
    assert step_milliseconds(run, rank=1) > 0
    assert said.count("Where the time of a step goes") == 1
    assert all(line["views_per_second"] == pytest.approx(2 * line["images_per_second"]) for line in train_lines(run))
