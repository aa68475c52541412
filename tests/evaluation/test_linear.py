"""The papers' linear protocols: their schedules, their batches and their updates."""

import pytest
import torch

from varscale.evaluation.features import Features
from varscale.evaluation.linear import PROTOCOLS, LinearProbe, Settings, hits_of, regroup
from varscale.evaluation.rmsprop import RMSProp

CPU = torch.device("cpu")


def stream(sizes: list[int]) -> list[Features]:
    rows = torch.arange(sum(sizes))
    return [Features(part[:, None].float(), part % 3, part) for part in rows.split(sizes)]


def test_what_is_not_asked_for_is_the_protocols_own():
    assert Settings() == Settings(protocol="cifar", epochs=100, lr=5.0)
    assert Settings(protocol="imagenet") == Settings(protocol="imagenet", epochs=90, lr=1.2)
    assert Settings(protocol="imagenet", lr=0.5) == Settings(protocol="imagenet", epochs=90, lr=0.5)


@pytest.mark.parametrize(("epochs", "falls"), [(100, [60, 75, 90]), (20, [12, 15, 18])])
def test_cifars_rate_falls_at_60_75_and_90_percent(epochs, falls):
    rates = [PROTOCOLS["cifar"].share(epoch, epochs) for epoch in range(epochs)]
    assert [epoch for epoch in range(1, epochs) if rates[epoch] != rates[epoch - 1]] == falls
    assert [rates[0], *(rates[epoch] for epoch in falls)] == pytest.approx([1.0, 0.2, 0.04, 0.008])


def test_imagenets_rate_rises_for_12_epochs_and_falls_every_half_epoch():
    protocol = PROTOCOLS["imagenet"]
    assert protocol.lr == pytest.approx(1.2)
    steps = 208  # of 1,281,167 images at 6,144
    rates = [protocol.share(step / steps, 90) for step in range(90 * steps)]
    assert rates[: 12 * steps] == pytest.approx([step / (12 * steps) for step in range(12 * steps)])
    falls = [step for step in range(12 * steps + 1, 90 * steps) if rates[step] != rates[step - 1]]
    assert falls == list(range(12 * steps + steps // 2, 90 * steps, steps // 2))
    assert rates[-1] == pytest.approx(0.97**155)


def test_imagenets_rate_scales_with_the_epochs():
    share = PROTOCOLS["imagenet"].share
    assert [share(epoch, 30) for epoch in (0, 2, 4, 29.9)] == pytest.approx([share(e, 90) for e in (0, 6, 12, 89.7)])


@pytest.mark.parametrize("sizes", [[10], [3, 3, 3, 1], [1] * 10, [2, 8]])
def test_batches_do_not_depend_on_how_the_stream_was_cut(sizes):
    batches = list(regroup(iter(stream(sizes)), 4))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[1].features.flatten().tolist() == [4, 5, 6, 7]
    assert batches[1].labels.tolist() == [1, 2, 0, 1]


def test_cifars_update_is_that_of_sgd_with_momentum():
    torch.manual_seed(0)
    features, labels = torch.randn(12, 5), torch.randint(0, 3, (12,))
    probe = LinearProbe(5, 3, CPU, PROTOCOLS["cifar"])
    for _ in range(2):
        probe.step(Features(features, labels, torch.arange(12)), lr=0.5)
    weight, momentum = torch.zeros(3, 5), torch.zeros(3, 5)
    bias, bias_momentum = torch.zeros(3), torch.zeros(3)
    onehot = torch.nn.functional.one_hot(labels, 3).float()
    for _ in range(2):
        error = ((features @ weight.T + bias).softmax(dim=1) - onehot) / 12
        momentum, bias_momentum = 0.9 * momentum + error.T @ features, 0.9 * bias_momentum + error.sum(dim=0)
        weight, bias = weight - 0.5 * momentum, bias - 0.5 * bias_momentum
    torch.testing.assert_close(probe.layer.weight.detach(), weight)
    torch.testing.assert_close(probe.layer.bias.detach(), bias)


def test_imagenets_update_is_tensorflows_on_smoothed_labels_and_unit_norm_features():
    torch.manual_seed(0)
    features, labels = 9 * torch.randn(12, 5), torch.randint(0, 3, (12,))
    probe = LinearProbe(5, 3, CPU, PROTOCOLS["imagenet"])
    rates = (0.1, 1.2)
    for lr in rates:
        probe.step(Features(features, labels, torch.arange(12)), lr)
    unit = features / features.norm(dim=1, keepdim=True)
    target = 0.95 * torch.nn.functional.one_hot(labels, 3).float() + 0.05 / 3
    weight, square, moment = torch.zeros(3, 5), torch.ones(3, 5), torch.zeros(3, 5)
    bias, bias_square, bias_moment = torch.zeros(3), torch.ones(3), torch.zeros(3)
    for lr in rates:
        error = ((unit @ weight.T + bias).softmax(dim=1) - target) / 12
        gradient, bias_gradient = error.T @ unit + 1e-6 * weight, error.sum(dim=0) + 1e-6 * bias
        square, bias_square = 0.9 * square + 0.1 * gradient**2, 0.9 * bias_square + 0.1 * bias_gradient**2
        moment = 0.9 * moment + lr * gradient / (square + 1e-3).sqrt()
        bias_moment = 0.9 * bias_moment + lr * bias_gradient / (bias_square + 1e-3).sqrt()
        weight, bias = weight - moment, bias - bias_moment
    torch.testing.assert_close(probe.layer.weight.detach(), weight)
    torch.testing.assert_close(probe.layer.bias.detach(), bias)


def test_rmsprop_is_timms():
    from timm.optim import RMSpropTF

    torch.manual_seed(0)
    first, second = (torch.nn.Parameter(start) for start in torch.randn(7, 4).expand(2, 7, 4).clone())
    ours = RMSProp([first], decay=0.9, momentum=0.9, eps=1e-3, weight_decay=1e-2)
    theirs = RMSpropTF([second], alpha=0.9, momentum=0.9, eps=1e-3, weight_decay=1e-2)
    for lr in (0.0, 0.1, 1.2, 0.3, 0.3):
        first.grad = torch.randn(7, 4)
        second.grad = first.grad.clone()
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = lr
        ours.step()
        theirs.step()
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_it_learns_what_is_linearly_separable(name):
    torch.manual_seed(1)
    labels = torch.arange(300) % 6
    data = Features(torch.eye(6)[labels] + 0.05 * torch.randn(300, 6), labels, torch.arange(300))
    protocol = PROTOCOLS[name]
    probe = LinearProbe(6, 6, CPU, protocol)
    for epoch in range(20):
        probe.step(data, protocol.lr * protocol.share(epoch, 20))
    assert hits_of(probe.logits, data, CPU).tolist() == [300, 300]
