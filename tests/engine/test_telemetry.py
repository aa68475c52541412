"""The meter averages over steps and ranks, metrics.jsonl stays readable, a collapse is said once an epoch."""

import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from varscale.config import load_config, resolve_batch
from varscale.engine.distributed import Ranks
from varscale.engine.launch import Job
from varscale.engine.learners import build_learner
from varscale.engine.meter import Meter
from varscale.engine.rundir import read_metrics
from varscale.engine.state import TrainState
from varscale.engine.taken import TakenStep
from varscale.engine.telemetry import Telemetry


@pytest.fixture(autouse=True)
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ranks(rank=0):
    return Ranks(rank, rank, 1, 1, torch.device("cpu"))


def vssl(tmp_path):
    config = load_config("digits-vssl", [f"output_dir={tmp_path}/run", "logging.every_steps=1", "schedule.epochs=2"])
    return config, build_learner(config, num_classes=10, total_steps=6, device=torch.device("cpu"))


def open_telemetry(config, state, *, rank=0):
    data = SimpleNamespace(info=SimpleNamespace(digest="digest", num_classes=10))
    return Telemetry(Job(config, resolve_batch(config.batch, 1), {}, data), 6, state, Meter(), ranks(rank))


def terms(spread):
    """Of one micro-batch whose latent means have this spread."""
    scalars = {"loss": 1.0, "kl": 0.4, "nll": 0.6, "cosine": 0.9, "direction_square": 1.0}
    direction = torch.tensor([[(1 - spread**2) ** 0.5, 0.0]] * 2)
    product = direction.T @ direction / 2 + spread**2 / 2 * torch.eye(2)
    vectors = {"direction": direction, "direction_product": product}
    return [{name: torch.tensor(value) for name, value in scalars.items()} | vectors]


def taken(state, terms):
    return TakenStep(state, terms, [], lr=0.1, gradient_norm=torch.tensor(1.0))


@pytest.mark.parametrize(("precision", "amx", "told"), [("bfloat16", 0, 1), ("bfloat16", 1, 0), ("float32", 0, 0)])
def test_a_cpu_slow_in_bfloat16_is_told_of_float32(tmp_path, monkeypatch, capsys, precision, amx, told):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx), raising=False)
    config = load_config("digits-varcon", [f"output_dir={tmp_path}/run", f"compute.precision={precision}"])
    open_telemetry(config, TrainState()).bar.close()
    assert capsys.readouterr().out.count("compute.precision=float32 may be the faster one") == told


def test_the_progress_bar_shows_speed_and_memory(tmp_path):
    config, learner = vssl(tmp_path)
    state = TrainState()
    with open_telemetry(config, state) as telemetry:
        for _ in range(2):
            state.advance(64)
            telemetry.throughput.end()
            telemetry.step(learner, taken(state, terms(0.5)))
        telemetry.catch_up()
        shown = str(telemetry.bar)
    for name in ("images/s", "views/s", "ms", "p90 ms", "data wait", "GiB"):
        assert re.search(rf"[ ,]{name}=[\d.e+-]+[,\]]", shown), (name, shown)


def test_the_meter_averages_and_starts_anew():
    meter = Meter()
    for value in (1.0, 2.0, 6.0):
        meter.add([{"loss": torch.tensor(value + part), "count": torch.tensor(3)} for part in (-1, 1)])
    assert meter.read() == {"loss": 3.0, "count": 3.0}
    meter.add([{"loss": torch.tensor(5.0), "count": torch.tensor(1)}])
    assert meter.read() == {"loss": 5.0, "count": 1.0}


def test_the_meter_adds_up_counts():
    meter = Meter()
    for values in ([1.0, 0.0], [0.0, 2.0]):
        meter.add([{"bad_sample_count": torch.tensor(value)} for value in values])
    assert meter.read() == {"bad_sample_count": 3.0}
    meter.add([{"bad_sample_count": torch.tensor(0.0)}])
    assert meter.read() == {"bad_sample_count": 0.0}


def test_the_meter_adds_up_histograms_over_micro_batches_and_steps():
    meter = Meter()
    for counts in ([[4, 0, 1], [0, 5, 0]], [[2, 2, 1], [0, 0, 5]]):
        meter.add([{"x_histogram": torch.tensor(part)} for part in counts])
    assert meter.read()["x_histogram"].tolist() == [6.0, 7.0, 7.0]
    assert meter.read() == {}


def test_the_meter_takes_extremes_and_the_last_step_of_vectors():
    meter = Meter()
    for values in ([1.0, 4.0], [-2.0, 3.0]):
        meter.add([{"x_min": torch.tensor(v), "x_max": torch.tensor(v), "x": torch.tensor([v, 0.0])} for v in values])
    found = meter.read()
    assert (found["x_min"], found["x_max"], found["x"].tolist()) == (-2.0, 4.0, [0.5, 0.0])
    meter.add([{"x_min": torch.tensor(7.0)}])
    assert meter.read() == {"x_min": 7.0}


def test_what_is_recorded_can_be_read_and_a_collapse_is_said_once_an_epoch(tmp_path, capsys):
    config, learner = vssl(tmp_path)
    state = TrainState()
    healthy, collapsed = 1.0, 0.05
    with open_telemetry(config, state) as telemetry:
        for spread in (healthy, collapsed, collapsed, collapsed, healthy, collapsed):
            state.advance(64)
            telemetry.step(learner, taken(state, terms(spread)))
        telemetry.record("knn", {"top1_k20": 90.0})
    said = [line for line in capsys.readouterr().out.splitlines() if "collapsing" in line]
    assert [line.split(":")[1].strip() for line in said] == ["step 2", "step 4"]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines if line["kind"] == "train"] == pytest.approx([s / 3 for s in range(1, 7)])
    assert lines[0]["spread"] == pytest.approx(1.0)
    assert lines[0]["effective_rank"] == pytest.approx(2.0)
    assert {"direction", "direction_square"}.isdisjoint(lines[0])
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_a_resumed_run_drops_the_steps_it_takes_again_and_a_torn_line(tmp_path):
    config, learner = vssl(tmp_path)
    state = TrainState()
    with open_telemetry(config, state) as telemetry:
        for _ in range(4):
            state.advance(64)
            telemetry.step(learner, taken(state, terms(0.1)))
            if state.step == 2:
                telemetry.sync()
                saved = state.to_dict()
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "st')
    with open_telemetry(config, TrainState.from_dict(saved)):
        pass
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_run_that_begins_with_another_ones_checkpoint_counts_its_own_metrics(tmp_path):
    config, learner = vssl(tmp_path)
    state = TrainState(step=2, metrics_bytes=12345)
    with open_telemetry(config, state) as telemetry:
        saved = state.to_dict()  # before the first line: a kill now must not keep the lines that follow
        state.advance(64)
        telemetry.step(learner, taken(state, terms(0.1)))
    with open_telemetry(config, TrainState.from_dict(saved)):
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_a_resumed_run_shows_no_step_twice_in_tensorboard(tmp_path):
    config, learner = vssl(tmp_path)
    state = TrainState()
    for loss in (1.0, 2.0):
        with open_telemetry(config, state) as telemetry:
            while state.step < 4:
                state.advance(64)
                step = [part | {"loss": torch.tensor(loss)} for part in terms(0.1)]
                telemetry.step(learner, taken(state, step))
                if state.step == 2:
                    telemetry.sync()
                    saved = state.to_dict()
        state = TrainState.from_dict(saved)
        time.sleep(1 - time.time() % 1)  # TensorBoard sorts its files by the second
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    seen = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert seen == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_other_ranks_write_nothing(tmp_path):
    config, learner = vssl(tmp_path)
    state = TrainState(step=1)
    with open_telemetry(config, state, rank=1) as telemetry:
        telemetry.step(learner, taken(state, terms(0.1)))
        telemetry.say("nothing")
    assert not (tmp_path / "run").exists()
