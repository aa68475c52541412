"""Every optimizer gives the same parameters at ZeRO stages 0 to 3, on two real processes under DeepSpeed."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from varscale.engine import distributed
from varscale.engine.optimizers import build_optimizer

WORLD_SIZE = 2
STAGES = (0, 1, 2, 3)
STEPS = 5
OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
    "adamw": {"name": "adamw", "lr": 1e-2, "weight_decay": 1e-1, "exclude_bias_and_norm": True},
    "lars": {"name": "lars", "lr": 1.0, "weight_decay": 1e-2, "exclude_bias_and_norm": True, "trust_coefficient": 0.02},
    # Biases adapt as well: many parameters smaller than the alignment of a partition.
    "lars_all": {"name": "lars", "lr": 1.0, "weight_decay": 1e-2, "trust_coefficient": 0.02, "clip_lr": True},
}


def make_network() -> nn.Module:
    """A small convolutional net in which no parameter's size is a multiple of the ranks' alignment."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 9, 7), nn.Linear(7, 1))
    return nn.Sequential(*layers)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 5, 5, generator=generator), torch.randn(8, 1, generator=generator)


def loss_of(network: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    network.eval()  # batch statistics would differ between one process and two
    return (network(images) - targets).square().mean()


def train_under_deepspeed(options: dict, stage: int, rank: int) -> dict[str, torch.Tensor]:
    import deepspeed

    network = make_network()
    group = dist.group.WORLD if stage else None
    settings = {
        "train_micro_batch_size_per_gpu": 8 // WORLD_SIZE,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
        # No parameter is small enough to stay whole under stage 3.
        "zero_optimization": {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
    }
    optimizer = build_optimizer(network.named_parameters(), partition_group=group, **options)
    engine = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)[0]
    assert not optimizer.state, "DeepSpeed stepped the optimizer before training"
    if stage == 3:
        fill_padding(network, rank, value=1e30)
    for step in range(STEPS):
        images, targets = (part.chunk(WORLD_SIZE)[rank] for part in batch(step))
        engine.backward(loss_of(engine, images, targets))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(network.parameters()), enabled=stage == 3):
        return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def fill_padding(network: nn.Module, rank: int, value: float) -> None:
    """Stage 3 pads shards with uninitialised memory, which may hold anything; here it holds `value`."""
    for parameter in network.parameters():
        shard = parameter.ds_tensor
        shard.data[max(parameter.ds_numel - rank * shard.ds_numel, 0) :] = value


def work(folder: Path) -> None:
    rank = distributed.join().rank
    found = {
        (name, stage): train_under_deepspeed(options, stage, rank)
        for name, options in OPTIMIZERS.items()
        for stage in STAGES
    }
    torch.save(found, folder / f"{rank}.pt")
    distributed.leave()


@pytest.fixture(scope="module")
def ranks(run_ranks, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The final parameters on each rank, by optimizer and stage."""
    return run_ranks(__file__, WORLD_SIZE, tmp_path_factory.mktemp("zero"))


def reference(name: str) -> dict[str, torch.Tensor]:
    """One process, the whole batch, no DeepSpeed, in float64."""
    network = make_network().double()
    optimizer = build_optimizer(network.named_parameters(), **OPTIMIZERS[name])
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(network, *(part.double() for part in batch(step))).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
    return {key: parameter.detach() for key, parameter in network.named_parameters()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stage_gives_the_parameters_of_one_plain_process(ranks: list[dict], name: str, stage: int) -> None:
    start = dict(make_network().named_parameters())
    for rank in ranks:
        for key, expected in reference(name).items():
            torch.testing.assert_close(rank[name, stage][key].double(), expected, rtol=0, atol=1e-6)
            if not key.startswith("1."):
                assert not torch.allclose(rank[name, stage][key], start[key], atol=1e-3), f"{key} did not move"


if __name__ == "__main__":
    work(Path(sys.argv[1]))
