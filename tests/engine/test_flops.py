"""Operations of a step, against the numbers that are known of these networks."""

import pytest
import torch
import torchvision.models
from torch import nn

from varscale.config import load_config, resolve_batch
from varscale.engine.flops import forward_flops, step_flops, training_flops
from varscale.engine.learners import build_learner
from varscale.models.encoders import build_encoder


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


def test_small_maps_count_as_the_convolutions_that_they_are():
    """How a CPU computes them (`Conv3x3`) is no business of a model's operations, nor of an MFU."""
    plain = torchvision.models.resnet18()
    plain.fc = nn.Identity()
    assert training_flops(build_encoder("resnet18", image_size=32), 32) == training_flops(plain, 32)


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


@pytest.mark.parametrize("objective", ["supcon", "simclr", "mocov3"])
def test_a_rank_has_its_share_of_all_pairs(objective):
    overrides = ["batch.gradient_accumulation_steps=2", "data.local_views=1", "data.local_size=8", "encoder.stem=cifar"]
    _, _, learner, found = flops(f"digits-{objective}", *overrides, world_size=4)
    assert found["first pass"] < found["student"]
    if objective == "mocov3":
        # Each of 3 views of an image against the others among the 2 large ones: 4 ordered pairs; 2 products each.
        assert found["key logits"] == 4 * 2 * 2 * (64 // 4) * 64 * 128
        assert found["teacher"] == 2 * (64 // 4) * forward_flops(learner.teacher.network, 32)
    else:
        assert found["pair logits"] == 3 * 2 * (3 * 64 // 4) * (3 * 64) * 128


def test_checkpointed_blocks_run_forward_once_more():
    vit = ["encoder={name: vit_ti, patch_size: 4}"]
    _, sizes, learner, plain = flops("digits-varcon", *vit)
    _, _, _, found = flops("digits-varcon", *vit, "encoder.activation_checkpointing=true")
    views, tokens = 2 * sizes.micro_batch_size, 8 * 8 + 1
    outside = 2 * (64 * 192 * 3 * 4 * 4 + 192 * 192 + 192 * 128)  # patches and head
    not_again = 12 * 2 * tokens * 192 * 768  # each block's last product: nothing needs its result once more
    assert found.pop("recomputation") == views * (forward_flops(learner.network, 32) - outside - not_again)
    assert found == plain


def test_plain_means_add_nothing():
    assert flops("digits-byol", "batch.gradient_accumulation_steps=2")[3].keys() == {"student", "teacher"}
    _, _, learner, found = flops("digits-cross_entropy", classes=7)
    assert found.keys() == {"student"}
    assert learner.network.head.out_features == 7
