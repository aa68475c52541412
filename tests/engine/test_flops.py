"""Operations of a step, against the numbers that are known of these networks."""

import pytest
import torch
from torch import nn

from varscale.config import load_config, resolve_batch
from varscale.engine.flops import forward_flops, step_flops, training_flops
from varscale.engine.learners import build_learner


def flops(recipe, *overrides, world_size=1, classes=10):
    config = load_config(recipe, overrides)
    sizes = resolve_batch(config.batch, world_size)
    learner = build_learner(config, classes, total_steps=1, device=torch.device("cpu"))
    return config, sizes, learner, step_flops(config, sizes, learner)


def test_a_linear_layer_by_hand():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    product = 2 * 3 * 4 * 4 * 5
    assert forward_flops(network, 4) == product
    # Backward the gradient of the weights alone: the images need none.
    assert training_flops(network, 4) == 2 * product
    assert network[1].weight.device.type == "cpu"


def test_resnet50_has_the_published_number_of_operations():
    _, _, learner, _ = flops("imagenet1k-varcon")
    assert forward_flops(learner.network.encoder, 224) == pytest.approx(2 * 4.09e9, rel=0.005)  # torchvision's table


def test_the_parts_of_a_step():
    _, sizes, learner, found = flops("digits-varcon", "batch.gradient_accumulation_steps=4", world_size=2)
    views = 2 * sizes.micro_batch_size * 4
    assert found["student"] == views * training_flops(learner.network, 32)
    assert found["first pass"] == views * forward_flops(learner.network, 32)
    assert found["class logits"] == 4 * views * 10 * 128
    assert "first pass" not in flops("digits-varcon", "objective.centroids=micro")[3]
    assert "first pass" not in flops("digits-varcon")[3]
    _, sizes, learner, found = flops("digits-vssl", "batch.gradient_accumulation_steps=2")
    assert found.keys() == {"student", "teacher"}
    assert found["teacher"] == 2 * sizes.micro_batch_size * 2 * forward_flops(learner.teacher.network, 32)
