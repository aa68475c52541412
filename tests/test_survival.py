"""Runs that are killed, told to stop, stalled or fed bad steps go on, and end with the bits of a run left alone."""

import json
import os
import re
import signal
import time
from functools import partial

import faults
import pytest
import torch
from safetensors.torch import load_file
from torture import KINDS, Run, compare
from torture import main as torture

from varscale.engine.checkpoints import damage
from varscale.engine.rundir import find_checkpoints, read_metrics

VIT = ["encoder.name=vit_ti", "encoder.stem=null", "encoder.patch_size=8"]
SMALL = ["batch.global_batch_size=32", "schedule.epochs=2", "compute.precision=float32", "checkpoint.every_steps=3"]
STEPS = 20  # 2 epochs of 10


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_rank():
    """Before the server of processes starts, which keeps this environment."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(scope="module")
def new_run(digits, tmp_path_factory):
    """A function: a run of a digits recipe that has not been started, by name."""
    folder = tmp_path_factory.mktemp("survival")

    def make(name, *overrides, recipe="digits-varcon", ranks=2):
        return Run(folder / name, recipe, [f"data.dir={digits}", *SMALL, *overrides], ranks)

    return make


@pytest.fixture(scope="module")
def undisturbed(new_run):
    run = new_run("undisturbed", *VIT)
    run.start()
    run.wait_for_end()
    return run


def checkpoint(run, step=STEPS):
    return run.place / "checkpoints" / f"step-{step:08d}"


def state(run, step=STEPS):
    return json.loads((checkpoint(run, step) / "state.json").read_text())["state"]


def with_fault(fault, **options):
    """What a run's ranks are to do instead: see tests/faults.py."""
    return partial(faults.rank_main, fault=partial(fault, **options))


def assert_same_tensors(first, second):
    """Of all parts but the meter: what was seen, a run tells for itself."""
    for path in first.glob("*.safetensors"):
        if path.stem == "meter":
            continue
        ours, theirs = load_file(path), load_file(second / path.name)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), f"{path.name}: {name}"


OTHERS = [
    ("digits-varcon", 3, 2),
    ("digits-supcon", 2, 2),
    ("digits-simclr", 0, 2),
    ("digits-byol", 0, 1),
    ("digits-mocov3", 3, 2),
]
OTHERS += [("digits-cross_entropy", 0, 1), ("digits-vssl", 2, 2)]


@pytest.mark.parametrize(
    ("recipe", "zero", "ranks"),
    [("digits-varcon", 0, 1)] + [pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS],
)
def test_torture(digits, capfd, recipe, zero, ranks):
    """Batch norm's statistics, too, must come back: those of VSSL's projector."""
    overrides = [f"data.dir={digits}", *SMALL, *VIT, f"deepspeed.config=zero{zero}", "compute.deterministic=true"]
    assert torture(["--recipe", recipe, "--ranks", str(ranks), "--kills", "3", "--seed", str(zero), *overrides]) == 0
    said = capfd.readouterr().err
    for kind in KINDS:
        assert re.search(rf"killed rank \S.* of {ranks} {kind}", said), (kind, said)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["digits-varcon", "digits-vssl"])  # of SGD and of AdamW
def test_torture_on_a_gpu(digits, recipe):
    overrides = [f"data.dir={digits}", *SMALL, "compute.deterministic=true", "compute.precision=bfloat16"]
    assert torture(["--recipe", recipe, "--kills", "3", *overrides]) == 0


def test_torture_without_data_says_so(capsys):
    assert torture(["--recipe", "cifar10-varcon", "data.dir=nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: nowhere holds no converted data set")
    assert said.count("\n") == 1


def test_signals_stop_all_ranks_after_the_same_step_with_a_checkpoint(new_run, undisturbed):
    run = new_run("signalled", *VIT)
    for moment, victim, number, code in (
        (4, 1, signal.SIGUSR2, 75),
        (9, 0, signal.SIGTERM, 75),
        (14, 0, signal.SIGINT, 130),
    ):
        run.start()
        run.wait_for_step(moment)
        for _ in range(2):  # as from Slurm and a launcher at once
            os.kill(run.processes[victim].pid, number)
        run.wait_for_end(code)
        assert f"stopped by {number.name}; the same command with --resume auto goes on" in run.log.read_text()
        assert state(run, run.steps())["step"] >= moment
    run.start()
    run.wait_for_end()
    assert compare(undisturbed, run, 3) == 0


def test_the_time_limit_stops_a_run(new_run):
    run = new_run("limited", *VIT, "safety.time_limit_minutes=0.0001", ranks=1)
    run.start()
    run.wait_for_end(75)
    assert run.steps() == 2, "one step ends while the next is taken"
    assert state(run, 2)["step"] == 2
    assert "stopped by the time limit" in run.log.read_text()


def test_a_run_whose_last_checkpoint_cannot_be_written_is_not_done(new_run, undisturbed):
    run = new_run("unsaved", *VIT)
    run.start(with_fault(faults.no_room, step=STEPS))
    run.wait_for_end(75)
    said = run.log.read_text()
    assert said.count("no room for it") > 1, "it tried again"
    assert "stopped by a last checkpoint that could not be written; the same command with --resume auto" in said
    assert state(run, 18)["step"] == 18
    run.start()
    run.wait_for_end()
    assert compare(undisturbed, run, 1) == 0


def test_a_run_whose_output_finds_no_room_ends_the_same(new_run, undisturbed):
    run = new_run("silent", *VIT)
    run.start(faults.silent)
    run.wait_for_end()
    assert compare(undisturbed, run, 0) == 0


def test_a_run_outlives_a_full_disk(new_run, undisturbed, disk):
    """Room for five checkpoints of 45 MB, for none from step 9 to 14; then one comes out of turn."""
    run, place = new_run("full", *VIT, "checkpoint.every_steps=6", "checkpoint.keep=9"), disk(260)
    run.place.symlink_to(place)
    run.start(with_fault(faults.full_disk, disk=place, full=9, free=14))
    run.wait_for_end()
    said = run.log.read_text()
    assert "No space left on device" in said
    assert "training goes on and will try again" in said
    written = [path for path in find_checkpoints(run.place) if damage(path) is None]
    first, retried, *later = sorted(int(path.name.removeprefix("step-")) for path in written)
    assert (first, later) == (6, [18, 20])
    assert 14 <= retried < 18
    assert compare(undisturbed, run, 0) == 0


def test_a_rank_that_stands_still_ends_the_others_with_their_stacks(new_run):
    run = new_run("stalled", *VIT, "safety.watchdog_seconds=6", "batch.global_batch_size=30", ranks=3)
    run.start()
    run.wait_for_step(3)
    stopped = run.processes[1]
    os.kill(stopped.pid, signal.SIGSTOP)
    begin = time.monotonic()
    try:
        for rank in (0, 2):
            run.processes[rank].join(60)
            assert run.processes[rank].exitcode == 75
        assert time.monotonic() - begin < 60
    finally:
        stopped.kill()
    said = run.log.read_text()
    for rank in (0, 2):
        assert f"watchdog: rank {rank} of 3 on " in said
    assert said.count("has done nothing for 6 s") == 2
    done = {int(step) for step in re.findall(r"the last step it saw done was (\d+)", said)}
    assert done <= {run.steps(), run.steps() + 1}, "metrics are recorded a step later, or with a checkpoint"
    for stacks in said.split("\nwatchdog: ")[1:]:
        assert re.search(r'train\.py", line \d+ in (take_step|run)\n', stacks), "each shows, unmixed, where it waited"


def test_a_dead_loader_ends_the_run_with_its_stack(new_run):
    run = new_run("starved", *VIT, "safety.watchdog_seconds=4", ranks=1)
    run.start(with_fault(faults.dead_loader, step=3))
    run.wait_for_end(75)
    said = run.log.read_text()
    assert "the last step it saw done was 1" in said, "while it waited for step 3, nobody asked after step 2"
    assert "/faults.py" in said, "the stack shows where it waited"


@pytest.mark.parametrize(
    ("recipe", "zero", "network", "first", "bad"),
    [
        ("digits-varcon", 0, [], 4, (5, 6)),  # a ResNet
        pytest.param("digits-vssl", 2, VIT, 4, (5, 6), marks=pytest.mark.slow),
        pytest.param("digits-varcon", 3, VIT, 8, (1, 2, 3), marks=pytest.mark.slow),
    ],
)
def test_bad_steps_are_skipped_or_rewound_from(new_run, recipe, zero, network, first, bad):
    """To rewind from step 6 to the checkpoint of 4, or from 3 to the beginning, is to pass over the steps between."""
    common = [f"deepspeed.config=zero{zero}", f"checkpoint.every_steps={first}", "checkpoint.keep=20"]
    common += ["schedule.epochs=1", "schedule.warmup_epochs=0", *network]
    skipped = new_run(f"skipped-{zero}", *common, "safety.bad_step=skip", recipe=recipe)
    skipped.start(with_fault(faults.nan_loss, bad=bad))
    skipped.wait_for_end()
    assert (state(skipped, 10)["bad_steps"], state(skipped, 10)["samples_seen"]) == (len(bad), 320)
    assert f"step {bad[-1]}: kl, loss not finite" in skipped.log.read_text()

    rewound = new_run(f"rewound-{zero}", *common, "safety.bad_step=rewind", recipe=recipe)
    rewound.start(with_fault(faults.counting_engines, bad=bad[-1:]))
    rewound.wait_for_end()
    assert state(rewound, 10)["bad_steps"] == 1
    assert_same_tensors(checkpoint(skipped, 10), checkpoint(rewound, 10))
    if first < bad[0]:  # batch norm's statistics and the teacher included
        assert_same_tensors(checkpoint(rewound, first), checkpoint(rewound, bad[-1]))
    if zero != 3:  # whose engine DeepSpeed itself does not let go
        assert rewound.log.read_text().count("engines: 0") == 2 * rewound.ranks


def test_a_rewind_from_the_last_step_records_nothing_twice_and_measures_what_is_saved(new_run):
    often = ["schedule.epochs=1", "schedule.warmup_epochs=0", "checkpoint.every_steps=4", "logging.every_steps=5"]
    run = new_run("rewound-late", *VIT, *often, "safety.bad_step=rewind", ranks=1)
    run.start(with_fault(faults.nan_loss, bad=(10,)))
    run.wait_for_end()
    lines = [(line["kind"], line["step"]) for line in read_metrics(run.place / "metrics.jsonl")]
    assert lines == [("train", 5), ("knn", 10)]
    assert load_file(checkpoint(run, 8) / "meter.safetensors")["steps"] == 3
    assert load_file(checkpoint(run, 10) / "meter.safetensors") == {}
    assert_same_tensors(checkpoint(run, 8), checkpoint(run, 10))
    assert state(run, 10)["best_step"] == 10
    assert (run.place / "checkpoints" / "best").resolve() == checkpoint(run, 10)


def test_too_many_bad_steps_stop_the_run(new_run):
    run = new_run("hopeless", *VIT, "safety.bad_step=skip", "safety.max_bad_steps=2", "safety.loss_limit=1e-3", ranks=1)
    run.start()
    run.wait_for_end(3)
    said = run.log.read_text()
    assert "the loss above safety.loss_limit" in said
    assert "it is one more than safety.max_bad_steps (2)" in said
    assert run.steps() == 0
