"""Under ZeRO-3 VSSL's teacher is partitioned: its bytes per rank fall with the ranks, and it stays a plain average."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

IMAGES, STEPS, SIZE = 16, 4, 16
SLOW = [(1, "zero3"), (2, "zero3_offload"), (4, "zero3")]
CASES = [(2, "zero3"), *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
OVERRIDES = [
    "compute.precision=float32",
    f"data.image_size={SIZE}",
    f"batch.global_batch_size={IMAGES}",
    "optimizer.lr=0.01",
    "objective.teacher_momentum=0.7",
]


def work(folder: Path, zero: str) -> None:
    """Trains on random images as train.py does, and beside it averages a plain teacher of the gathered student."""
    from varscale.config import load_config, resolve_batch, resolve_deepspeed
    from varscale.engine import distributed
    from varscale.engine.learners import MicroBatch, build_learner
    from varscale.engine.opening import open_engine
    from varscale.engine.schedules import teacher_momentum
    from varscale.engine.zero import whole_state_dict
    from varscale.models.teacher import MomentumTeacher
    from varscale.train import take_step

    ranks = distributed.join()
    config = load_config("digits-vssl", [*OVERRIDES, f"deepspeed.config={zero}"])
    learner = build_learner(config, 10, STEPS, ranks.device)
    student, plain = deepcopy(learner.network), MomentumTeacher(learner.network)
    start = deepcopy(plain.state_dict())
    sizes = resolve_batch(config.batch, ranks.world_size)
    engine = open_engine(config, resolve_deepspeed(config, sizes), learner)

    def whole(module):
        found = [whole_state_dict(module)]  # on rank 0 alone
        torch.distributed.broadcast_object_list(found)
        return found[0]

    generator, held = torch.Generator().manual_seed(0), []
    for step in range(1, STEPS + 1):
        views = torch.randn(2, IMAGES, 3, SIZE, SIZE, generator=generator)
        mine = views.chunk(ranks.world_size, dim=1)[ranks.rank].flatten(0, 1)
        take_step(engine, learner, [MicroBatch((mine,), *torch.zeros(2, len(mine) // 2, dtype=torch.int64))])
        learner.after_step(step)
        held.append(bytes_held(learner.teacher))
        student.load_state_dict(whole(engine.module))
        o = config.objective
        momentum = teacher_momentum(step, STEPS, base=o.teacher_momentum, final=o.teacher_momentum_final)
        plain.update(student, momentum)
    found = {
        "held": held,
        "start": start,
        "output": list(learner.teacher(mine)),
        "expected_output": list(plain(mine)),
        "state": whole(learner.teacher),
        "expected_state": plain.state_dict(),
    }
    torch.save(found, folder / f"{ranks.rank}.pt")
    distributed.leave()


def bytes_held(module: nn.Module) -> int:
    """Of parameters on this rank: their parts, and what lies there whole."""
    storages = {}
    for parameter in module.parameters():
        for tensor in (parameter.data, getattr(parameter, "ds_tensor", parameter.data)):
            storages[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(storages.values())


@pytest.fixture(scope="module", params=CASES, ids=str)
def ranks(request: pytest.FixtureRequest, run_ranks, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    world_size, zero = request.param
    return run_ranks(__file__, world_size, tmp_path_factory.mktemp("teacher"), zero)


def parameter_bytes(state: dict[str, Tensor]) -> int:
    return sum(
        t.numel() * t.element_size() for name, t in state.items() if "running" not in name and "num_" not in name
    )


def test_bytes_per_rank_fall_with_the_ranks(ranks: list[dict]) -> None:
    whole = parameter_bytes(ranks[0]["start"])
    for rank in ranks:
        for held in rank["held"]:
            assert whole / len(ranks) <= held <= 1.01 * whole / len(ranks)  # every part is padded to equal length


def test_it_is_the_plain_moving_average(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["state"].keys() == rank["expected_state"].keys()
        for name, expected in rank["expected_state"].items():
            assert torch.equal(rank["state"][name], expected), name
    moved = [name for name, value in ranks[0]["state"].items() if not torch.equal(value, ranks[0]["start"][name])]
    assert set(moved) == set(ranks[0]["state"])


def test_its_forward_is_the_plain_teachers(ranks: list[dict]) -> None:
    for rank in ranks:
        for found, expected in zip(rank["output"], rank["expected_output"], strict=True):
            assert torch.equal(found, expected)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
