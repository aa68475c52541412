"""A checkpoint gives the same tensors, bit for bit, on any number of ranks and in any ZeRO stage."""

import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import varscale  # noqa: F401 -- before torch's threads start

OVERRIDES = ["encoder.name=vit_ti", "encoder.stem=null", "encoder.patch_size=8", "batch.global_batch_size=32"]
OVERRIDES += ["schedule.epochs=2", "optimizer.name=lars", "optimizer.lr=0.5", "checkpoint.every_steps=2"]
OVERRIDES += ["safety.time_limit_minutes=0.0001", "compute.precision=float32"]
# The numbers of ranks that save and that go on, with their stages.
SOURCES = {"zero0": 1, "zero2": 2, "zero3": 2}
TARGETS = {1: ("zero0", "zero3_offload"), 2: ("zero1", "zero3"), 4: ("zero2",)}


def work(folder: Path, *checkpoints: Path) -> None:
    """Open each checkpoint in every stage, and collect it again."""
    from varscale.config import resolve_batch, resolve_deepspeed
    from varscale.engine import distributed, resume
    from varscale.engine.learners import build_learner
    from varscale.engine.meter import Meter
    from varscale.engine.opening import free_memory, open_engine
    from varscale.engine.rundir import run_config

    ranks, found = distributed.join(), {}
    for checkpoint, zero in product(checkpoints, TARGETS[ranks.world_size]):
        config = run_config(checkpoint.parents[1])
        config = config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"config": zero})})
        learner, meter = build_learner(config, 10, 10, ranks.device), Meter()
        resume.restore_modules(checkpoint, learner)
        engine = open_engine(config, resolve_deepspeed(config, resolve_batch(config.batch, ranks.world_size)), learner)
        state = resume.restore_progress(checkpoint, engine, meter, ranks)
        found[str(checkpoint), zero] = resume.collect(engine, learner, meter), state.to_dict()
        del learner, engine
        free_memory()
    torch.save(found, folder / f"{ranks.rank}.pt")
    distributed.leave()


@pytest.fixture(scope="module")
def checkpoints(digits, tmp_path_factory):
    from torture import Run

    runs = []
    for zero, ranks in SOURCES.items():
        overrides = [f"data.dir={digits}", *OVERRIDES, f"deepspeed.config={zero}"]
        run = Run(tmp_path_factory.mktemp("elastic") / zero, "digits-vssl", overrides, ranks)
        run.start()
        run.wait_for_end(75)  # the time limit, after two steps
        runs.append(run.place)
    return [(run / "checkpoints" / "latest").resolve() for run in runs]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_is_restored_is_what_was_saved(run_ranks, checkpoints, tmp_path, world_size):
    first, *others = run_ranks(__file__, world_size, tmp_path, *checkpoints)
    assert all(not any(parts.values()) for rank in others for parts, _ in rank.values()), "rank 0 alone needs copies"
    assert len(first) == len(SOURCES) * len(TARGETS[world_size])
    for (checkpoint, zero), (parts, state) in first.items():
        assert (state["step"], state["samples_seen"]) == (2, 64)
        assert parts.keys() == {"model", "optimizer", "teacher", "meter"}
        for part in ("model", "optimizer", "teacher"):
            expected = load_file(f"{checkpoint}/{part}.safetensors")
            assert parts[part].keys() == expected.keys(), (checkpoint, zero, part)
            for name, tensor in parts[part].items():
                assert torch.equal(tensor, expected[name]), (checkpoint, zero, part, name)


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
