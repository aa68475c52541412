"""The learners: exact centroids over micro-batches, what is logged of a step, the teacher's pace."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from varscale.config import load_config
from varscale.engine.learners import MicroBatch, build_learner
from varscale.engine.learners.varcon import TAU2_BINS, confidence_histogram
from varscale.models.heads import ProjectionHead
from varscale.models.norm import SyncBatchNorm
from varscale.objectives.byol import byol_loss
from varscale.objectives.mocov3 import mocov3_loss
from varscale.objectives.supcon import supcon_loss
from varscale.objectives.varcon import varcon_loss
from varscale.objectives.vssl import Gaussian, vssl_loss

VIT = ["encoder.name=vit_ti", "encoder.stem=null", "encoder.patch_size=8"]


def batches(count, images=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(2, count, images, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 4, (count, images), generator=generator)
    return [
        MicroBatch((whole[:, i].flatten(0, 1),), labels[i], torch.arange(images) + i * images) for i in range(count)
    ], MicroBatch((whole.flatten(0, 2),), labels.flatten(), torch.arange(count * images))


def learner_for(recipe, *overrides):
    config = load_config(recipe, ["data.image_size=16", "compute.precision=float32", *overrides])
    return build_learner(config, num_classes=5, total_steps=10, device=torch.device("cpu"))


def gradient(learner, micro_batches):
    learner.network.zero_grad()
    learner.before_step(learner.network, micro_batches)
    means = {}
    for batch in micro_batches:
        loss, terms = learner.loss(learner.network, batch)
        (loss / len(micro_batches)).backward()
        for name, value in terms.items():
            share = 1 if name.endswith("_histogram") else len(micro_batches)
            means[name] = means.get(name, 0.0) + value.detach() / share
    return {n: p.grad.clone() for n, p in learner.network.named_parameters()}, learner.derive(means)


def test_exact_centroids_make_micro_batches_one_batch_and_micro_ones_do_not():
    parts, whole = batches(3)
    exact, micro = learner_for("digits-varcon", *VIT), learner_for("digits-varcon", *VIT, "objective.centroids=micro")
    expected, terms = gradient(exact, [whole])
    found, found_terms = gradient(exact, parts)
    cheap, _ = gradient(micro, parts)
    scale = max(g.abs().max() for g in expected.values())
    assert max((found[n] - expected[n]).abs().max() for n in expected) < 1e-5 * scale
    assert max((cheap[n] - expected[n]).abs().max() for n in expected) > 1e-2 * scale
    assert found_terms.pop("tau2_histogram") == terms.pop("tau2_histogram")
    assert found_terms == pytest.approx(terms, rel=1e-5)


def test_the_first_pass_leaves_running_statistics_alone():
    parts, _ = batches(2)
    learner = learner_for("digits-varcon")
    before = {n: b.clone() for n, b in learner.network.named_buffers()}
    learner.before_step(learner.network, parts)
    assert all(torch.equal(b, before[n]) for n, b in learner.network.named_buffers())
    learner.loss(learner.network, parts[0])
    assert not torch.equal(learner.network.encoder.bn1.running_mean, before["encoder.bn1.running_mean"])


def test_the_shown_temperature_is_mean_and_deviation_over_samples():
    _, whole = batches(1, images=32)
    learner = learner_for("digits-varcon", *VIT)
    _, shown = gradient(learner, [whole])
    _, terms = varcon_loss(learner.network(*whole.views), whole.labels.repeat(2), 5)
    assert shown["tau2"] == pytest.approx(terms["tau2"].mean().item(), rel=1e-6)
    assert shown["tau2_std"] == pytest.approx(terms["tau2"].std(correction=0).item(), rel=1e-3)
    counts, _ = np.histogram(terms["tau2"], TAU2_BINS, (0.08, 0.12))
    assert shown["tau2_histogram"] == counts.tolist()


@pytest.mark.parametrize("epsilon", [0.0, 0.05])
def test_the_ends_of_the_histogram_are_certainty(epsilon):
    counts = confidence_histogram(torch.tensor([0.0, 1e-6, 0.5, 1.0, 1.0]))
    assert (counts[0], counts[TAU2_BINS // 2], counts[-1], counts.sum()) == (2, 1, 2, 5)
    _, whole = batches(1)
    _, shown = gradient(learner_for("digits-varcon", *VIT, f"objective.epsilon={epsilon}"), [whole])
    assert sum(shown["tau2_histogram"]) == 16


@pytest.mark.parametrize("objective", ["supcon", "simclr", "byol", "mocov3", "cross_entropy"])
def test_a_baseline_takes_views_of_several_sizes(objective):
    sizes = ["data.views=2", "data.local_views=3", "data.local_size=8", "encoder.stem=cifar"]
    learner = learner_for(f"digits-{objective}", *sizes)
    generator = torch.Generator().manual_seed(0)
    large, small = (torch.randn(count * 4, 3, size, size, generator=generator) for count, size in ((2, 16), (3, 8)))
    batch = MicroBatch((large, small), torch.tensor([0, 1, 1, 2]), torch.arange(4))
    whole, _ = learner.loss(learner.network, batch)
    whole.backward()
    assert all(p.grad.isfinite().all() for p in learner.network.parameters())
    o, outputs = learner.objective if objective != "cross_entropy" else None, learner.network(large, small)
    if objective == "cross_entropy":
        expected = torch.nn.functional.cross_entropy(outputs, batch.labels.repeat(5), label_smoothing=0.1)
    elif objective in ("supcon", "simclr"):
        numbers = batch.labels if objective == "supcon" else batch.indices
        expected, _ = supcon_loss(outputs, numbers.repeat(5), temperature=o.temperature)
    else:
        loss = {"byol": byol_loss, "mocov3": partial(mocov3_loss, temperature=0.2)}[objective]
        expected, _ = loss(outputs.split(4), learner.teacher(large).split(4))
    assert whole.item() == pytest.approx(expected.item(), rel=1e-5)


def test_equal_seeds_give_equal_networks_and_others_do_not():
    first, again, other = (learner_for("digits-varcon", f"seed={seed}").network for seed in (0, 0, 1))
    name = "encoder.conv1.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_the_teacher_moves_by_its_schedule_and_is_not_trained():
    learner = learner_for("digits-vssl", *VIT, "objective.teacher_momentum=0.5")
    _, whole = batches(1)
    gradient(learner, [whole])
    assert all(p.grad is None for p in learner.teacher.parameters())
    name = "encoder.conv_proj.weight"
    student, teacher = learner.network.state_dict()[name], learner.teacher.network.state_dict()[name]
    assert torch.equal(student, teacher)
    with torch.no_grad():
        learner.network.get_parameter(name).add_(1.0)
    before = teacher.clone()
    learner.after_step(5)  # half of the way from 0.5 to 1: momentum 0.75
    moved = learner.teacher.network.state_dict()[name] - before
    assert torch.allclose(moved, torch.full_like(moved, 0.25), atol=1e-6)


def test_more_than_two_views():
    config = load_config("digits-vssl", ["data.views=3", "compute.precision=float32"])
    learner = build_learner(config, num_classes=5, total_steps=10, device=torch.device("cpu"))
    batch = MicroBatch((torch.randn(12, 3, 16, 16),), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    loss, terms = learner.loss(learner.network, batch)
    assert torch.isfinite(loss)
    assert 0 <= learner.derive(terms)["spread"] <= 1


# Without batch normalisation, which sees micro-batches by themselves.
PLAIN_HEADS = "varscale.models.networks.batch_normalised_mlp"


@pytest.mark.parametrize("objective", ["supcon", "simclr", "byol", "mocov3", "cross_entropy"])
def test_micro_batches_of_a_baseline_are_one_batch(monkeypatch, objective):
    monkeypatch.setattr(PLAIN_HEADS, lambda d, hidden, out, **_: ProjectionHead(d, out, hidden))
    views = ["data.views=2"]
    parts, whole = batches(3)
    learner = learner_for(f"digits-{objective}", *VIT, *views)
    if learner.companions():
        with torch.no_grad():  # a teacher of its own
            for parameter in learner.teacher.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expected, terms = gradient(learner, [whole])
    found, found_terms = gradient(learner, parts)
    scale = max(g.abs().max() for g in expected.values())
    assert max((found[n] - expected[n]).abs().max() for n in expected) < 1e-5 * scale
    assert found_terms == pytest.approx(terms, rel=1e-5, abs=1e-6)
    again, _ = gradient(learner, [whole])  # nothing is left of the step before
    assert all(torch.equal(again[n], expected[n]) for n in expected)


@pytest.mark.parametrize("objective", ["simclr", "mocov3"])
def test_the_first_pass_of_a_baseline_leaves_running_statistics_alone(objective):
    parts, _ = batches(2)
    learner = learner_for(f"digits-{objective}")
    before = {n: b.clone() for n, b in learner.network.named_buffers()}
    learner.before_step(learner.network, parts)
    assert all(torch.equal(b, before[n]) for n, b in learner.network.named_buffers())


def test_what_makes_images_alike():
    """Images of one class for SupCon, an image's own views for SimCLR."""
    _, whole = batches(1, images=6)
    for objective, numbers in (("supcon", whole.labels), ("simclr", whole.indices)):
        learner = learner_for(f"digits-{objective}", *VIT)
        loss, _ = learner.loss(learner.network, whole)
        o = learner.objective
        expected, _ = supcon_loss(learner.network(*whole.views), numbers.repeat(2), temperature=o.temperature)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("objective", ["byol", "mocov3"])
def test_a_teachers_collapse_is_warned_of(objective):
    learner = learner_for(f"digits-{objective}", *VIT)
    _, whole = batches(1)
    _, shown = gradient(learner, [whole])
    assert 0 <= shown["spread"] <= 1
    assert learner.warning(shown | {"spread": 0.9, "effective_rank": 9.0}) is None
    assert "effective rank 1.2 (of" in learner.warning(shown | {"spread": 0.9, "effective_rank": 1.2})
    with torch.no_grad():
        learner.network.predictor[1].weight.zero_()
        learner.network.predictor[1].bias.fill_(1.0)
    _, shown = gradient(learner, [whole])
    assert shown["spread"] < 1e-3
    assert "collapsing: spread 0.0" in learner.warning(shown)


def test_mocov3_has_the_heads_of_its_code_for_resnets():
    network = learner_for("cifar10-mocov3", *VIT).network
    *_, hidden, _, _, last = network.projector
    assert (hidden.num_features, last.num_features, last.affine) == (4096, 256, False)
    linear = [layer for part in (network.projector, network.predictor) for layer in part if type(layer) is nn.Linear]
    assert [layer.bias for layer in linear] == [None] * 4
    assert [type(layer) for layer in network.predictor] == [nn.Linear, SyncBatchNorm, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("recipe", ["digits-varcon", "digits-vssl"])
def test_views_of_several_sizes(recipe):
    learner = learner_for(recipe, "data.local_views=3", "data.local_size=8", "encoder.stem=cifar")
    generator = torch.Generator().manual_seed(0)
    large, small = (torch.randn(count * 4, 3, size, size, generator=generator) for count, size in ((2, 16), (3, 8)))
    labels = torch.tensor([0, 1, 1, 2])
    loss, _ = learner.loss(learner.network, MicroBatch((large, small), labels, torch.arange(4)))
    if recipe == "digits-varcon":
        embeddings = torch.cat([learner.network.encoder(part) for part in (large, small)])
        expected, _ = varcon_loss(learner.network.head(embeddings), labels.repeat(5), 5)
    else:
        # Every view of the student against every other large one of the teacher: 5 x 2 - 2 pairs.
        student = learner.network(large, small)
        views = [Gaussian(*view) for view in zip(*(part.split(4) for part in student), strict=True)]
        teacher = [Gaussian(*view) for view in zip(*(part.split(4) for part in learner.teacher(large)), strict=True)]
        pairs = [(a, b) for a in range(5) for b in range(2) if a != b]
        assert len(pairs) == 8
        losses = [vssl_loss([views[a]] * 2, [teacher[b]] * 2)[0] for a, b in pairs]
        expected = sum(losses) / len(pairs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
