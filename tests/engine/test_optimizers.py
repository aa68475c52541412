"""The optimizers against plain step-by-step references, and which parameters decay and adapt."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from varscale.engine.optimizers import LARS, build_optimizer
from varscale.models.encoders import build_encoder


def make_network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    return nn.Sequential(*layers).double()


def gradients(network: nn.Module, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    return list(torch.autograd.grad(network(images).square().mean(), list(network.parameters())))


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for step in range(steps):
        for parameter, gradient in zip(network.parameters(), gradients(network, step), strict=True):
            parameter.grad = gradient
        optimizer.step()


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("lr", [0.02, 0.7])  # below and above what the trust coefficient allows
def test_lars_against_a_plain_reference(exclude: bool, clip: bool, lr: float) -> None:
    momentum, decay, trust = 0.9, 0.01, 0.02
    network, reference = make_network(), make_network()
    options = {"lr": lr, "momentum": momentum, "weight_decay": decay, "trust_coefficient": trust, "clip_lr": clip}
    train(network, build_optimizer(network.named_parameters(), name="lars", exclude_bias_and_norm=exclude, **options))

    velocities = [0.0 for _ in reference.parameters()]
    for step in range(5):
        grads = gradients(reference, step)
        for i, (w, g) in enumerate(zip(reference.parameters(), grads, strict=True)):
            if not (exclude and w.ndim == 1):
                norm, grad_norm = w.data.square().sum().sqrt(), g.square().sum().sqrt()
                ratio = trust * norm / (grad_norm + decay * norm) if norm > 0 and grad_norm > 0 else 1.0
                ratio = min(ratio, lr) / lr if clip else ratio
                g = ratio * (g + decay * w.data)
            velocities[i] = momentum * velocities[i] + g
            w.data -= lr * velocities[i]
    for found, expected in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "rate"), [("sgd", 0.1), ("adamw", 0.01)])
@pytest.mark.parametrize("exclude", [True, False])
def test_sgd_and_adamw_decay_what_they_should(name: str, rate: float, exclude: bool) -> None:
    network, reference = make_network(), make_network()
    train(
        network,
        build_optimizer(
            network.named_parameters(),
            name=name,
            lr=rate,
            momentum=0.8,
            betas=(0.8, 0.95),
            weight_decay=0.1,
            exclude_bias_and_norm=exclude,
        ),
    )
    groups = [{"params": [p], "weight_decay": 0.0 if exclude and p.ndim == 1 else 0.1} for p in reference.parameters()]
    if name == "sgd":
        train(reference, torch.optim.SGD(groups, lr=rate, momentum=0.8))
    else:
        train(reference, torch.optim.AdamW(groups, lr=rate, betas=(0.8, 0.95)))
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if name == "sgd" else {"rtol": 1e-8, "atol": 1e-10}  # fused Adam rounds
    for found, expected in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


def test_zero_norms_have_ratio_one() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    still = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([weight, still], lr=0.5, momentum=0.0, weight_decay=0.1)
    weight.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.5))
    torch.testing.assert_close(still.detach(), torch.full((2, 2), 1 - 0.5 * 0.1))


def test_lars_step_follows_the_weight_not_the_gradient() -> None:
    moves = []
    for scale in (1.0, 1e4):
        weight = nn.Parameter(torch.ones(3, 3))
        weight.grad = torch.ones(3, 3) * scale
        LARS([weight], lr=1.0, momentum=0.0, trust_coefficient=0.01).step()
        moves.append(1 - weight.detach())
    torch.testing.assert_close(moves[0], moves[1])
    torch.testing.assert_close(moves[0], torch.full((3, 3), 0.01))


def test_lars_state_survives_saving() -> None:
    options = {"name": "lars", "lr": 0.5, "weight_decay": 1e-4, "exclude_bias_and_norm": True}
    network = make_network()
    optimizer = build_optimizer(network.named_parameters(), **options)
    train(network, optimizer, steps=2)
    copy = make_network()
    copy.load_state_dict(network.state_dict())
    restored = build_optimizer(copy.named_parameters(), **options)
    restored.load_state_dict(deepcopy(optimizer.state_dict()))
    train(network, optimizer, steps=2)
    train(copy, restored, steps=2)
    for found, expected in zip(copy.parameters(), network.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_vit_exclusions(name: str) -> None:
    encoder = build_encoder("vit_s", image_size=32, patch_size=16)
    encoder.class_token.requires_grad_(False)
    optimizer = build_optimizer(
        encoder.named_parameters(), name=name, lr=0.1, weight_decay=0.05, exclude_bias_and_norm=True
    )
    names = {id(p): key for key, p in encoder.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decays) == set(names.values()) - {"class_token"}
    for key, decay in decays.items():
        excluded = key.endswith(("bias", "pos_embedding")) or ".ln" in key
        assert decay == (0.0 if excluded else 0.05), key


def test_excluding_nothing_makes_one_group() -> None:
    network = make_network()
    assert len(build_optimizer(network.named_parameters(), name="sgd", lr=0.1).param_groups) == 1
    only_biases = [("bias", nn.Parameter(torch.zeros(3)))]
    groups = build_optimizer(only_biases, name="lars", lr=0.1, exclude_bias_and_norm=True).param_groups
    assert [group["adapt"] for group in groups] == [False]


def test_partitioned_lars_needs_a_group_per_parameter(tmp_path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="each adapted parameter must be a group of its own"):
            LARS([nn.Parameter(torch.ones(2, 2)) for _ in range(2)], lr=0.1, partition_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_wrong_calls_are_named() -> None:
    network = make_network()
    with pytest.raises(ValueError, match="'adam', expected 'sgd', 'adamw' or 'lars'"):
        build_optimizer(network.named_parameters(), name="adam", lr=0.1)
    with pytest.raises(ValueError, match="none of them needs a gradient"):
        build_optimizer(network.requires_grad_(False).named_parameters(), name="sgd", lr=0.1)
    with pytest.raises(ValueError, match="weight is empty; build the optimizer before ZeRO"):
        build_optimizer([("weight", nn.Parameter(torch.empty(0)))], name="sgd", lr=0.1)
