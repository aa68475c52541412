"""The papers' linear protocol: its schedule, its batches and its updates."""

import pytest
import torch

from varscale.evaluation.features import Features
from varscale.evaluation.linear import LinearProbe, learning_rate, regroup


def stream(sizes: list[int]) -> list[Features]:
    rows = torch.arange(sum(sizes))
    return [Features(part[:, None].float(), part % 3, part) for part in rows.split(sizes)]


def test_the_rate_falls_at_60_75_and_90_of_100_epochs():
    rates = [learning_rate(5.0, epoch, 100) for epoch in range(100)]
    drops = [epoch for epoch in range(1, 100) if rates[epoch] != rates[epoch - 1]]
    assert drops == [60, 75, 90]
    assert [rates[0], rates[60], rates[75], rates[90]] == pytest.approx([5.0, 1.0, 0.2, 0.04])


def test_the_milestones_scale_with_the_epochs():
    rates = [learning_rate(1.0, epoch, 20) for epoch in range(20)]
    assert [epoch for epoch in range(1, 20) if rates[epoch] != rates[epoch - 1]] == [12, 15, 18]


@pytest.mark.parametrize("sizes", [[10], [3, 3, 3, 1], [1] * 10, [2, 8]])
def test_batches_do_not_depend_on_how_the_stream_was_cut(sizes):
    batches = list(regroup(iter(stream(sizes)), 4))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[1].features.flatten().tolist() == [4, 5, 6, 7]
    assert batches[1].labels.tolist() == [1, 2, 0, 1]


def test_an_update_is_that_of_sgd_with_momentum():
    torch.manual_seed(0)
    features, labels = torch.randn(12, 5), torch.randint(0, 3, (12,))
    probe = LinearProbe(5, 3, torch.device("cpu"))
    probe.train_epoch([Features(features, labels, torch.arange(12))] * 2, lr=0.5)
    weight, momentum = torch.zeros(3, 5), torch.zeros(3, 5)
    bias, bias_momentum = torch.zeros(3), torch.zeros(3)
    onehot = torch.nn.functional.one_hot(labels, 3).float()
    for _ in range(2):
        error = ((features @ weight.T + bias).softmax(dim=1) - onehot) / 12
        momentum, bias_momentum = 0.9 * momentum + error.T @ features, 0.9 * bias_momentum + error.sum(dim=0)
        weight, bias = weight - 0.5 * momentum, bias - 0.5 * bias_momentum
    torch.testing.assert_close(probe.layer.weight.detach(), weight)
    torch.testing.assert_close(probe.layer.bias.detach(), bias)


def test_it_learns_what_is_linearly_separable():
    torch.manual_seed(1)
    labels = torch.arange(300) % 6
    data = Features(torch.eye(6)[labels] + 0.05 * torch.randn(300, 6), labels, torch.arange(300))
    probe = LinearProbe(6, 6, torch.device("cpu"))
    for epoch in range(20):
        probe.train_epoch([data], learning_rate(5.0, epoch, 20))
    assert probe.count_hits(data).tolist() == [300, 300]
