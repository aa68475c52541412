"""A checkpoint of two ranks under ZeRO-3 gives the same tensors, bit for bit, on other ranks and in other stages."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import varscale  # noqa: F401 -- before torch's threads start

OVERRIDES = ["encoder.name=vit_ti", "encoder.stem=null", "encoder.patch_size=8", "batch.global_batch_size=32"]
OVERRIDES += ["schedule.epochs=2", "optimizer.name=lars", "optimizer.lr=0.5", "checkpoint.every_steps=2"]
OVERRIDES += ["safety.time_limit_minutes=0.0001", "compute.precision=float32", "deepspeed.config=zero3"]
STAGES = {1: (0, 2), 2: (0, 1, 3), 4: (2, 3)}  # by the number of ranks that go on


def work(folder: Path, checkpoint: Path) -> None:
    """Open the checkpoint in every stage, and collect it again."""
    from varscale.config import resolve_batch, resolve_deepspeed
    from varscale.engine import distributed, resume
    from varscale.engine.learners import build_learner
    from varscale.engine.meter import Meter
    from varscale.engine.opening import open_engine
    from varscale.engine.rundir import run_config

    ranks, found = distributed.join(), {}
    for stage in STAGES[ranks.world_size]:
        config = run_config(checkpoint.parents[1])
        config = config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"config": f"zero{stage}"})})
        learner, meter = build_learner(config, 10, 10, ranks.device), Meter()
        resume.restore_modules(checkpoint, learner)
        engine = open_engine(config, resolve_deepspeed(config, resolve_batch(config.batch, ranks.world_size)), learner)
        state = resume.restore_progress(checkpoint, engine, meter, ranks)
        found[stage] = resume.collect(engine, learner, meter), state.to_dict()
    torch.save(found, folder / f"{ranks.rank}.pt")
    distributed.leave()


@pytest.fixture(scope="module")
def checkpoint(digits, tmp_path_factory):
    from torture import Run

    run = Run(tmp_path_factory.mktemp("elastic") / "run", "digits-vssl", [f"data.dir={digits}", *OVERRIDES], ranks=2)
    run.start()
    run.wait_for_end(75)  # the time limit, after a step
    return (run.place / "checkpoints" / "latest").resolve()


@pytest.mark.parametrize("world_size", STAGES)
def test_what_is_restored_is_what_was_saved(run_ranks, checkpoint, tmp_path, world_size):
    first, *others = run_ranks(__file__, world_size, tmp_path, checkpoint)
    assert all(not any(parts.values()) for rank in others for parts, _ in rank.values()), "rank 0 alone needs copies"
    for stage, (parts, state) in first.items():
        assert (state["step"], state["samples_seen"]) == (1, 32)
        assert parts.keys() == {"model", "optimizer", "teacher", "meter"}
        for part in ("model", "optimizer", "teacher"):
            expected = load_file(checkpoint / f"{part}.safetensors")
            assert parts[part].keys() == expected.keys(), (stage, part)
            for name, tensor in parts[part].items():
                assert torch.equal(tensor, expected[name]), (stage, part, name)


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:3]))
