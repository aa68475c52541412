"""The fast linear evaluation against scikit-learn and autograd, and what it must not depend on."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from varscale.data.sampling import epoch_order
from varscale.evaluation import linear_cached
from varscale.evaluation.features import Features
from varscale.evaluation.linear_cached import LEARNING_RATES, WEIGHT_DECAYS, Setting, Standardise, choose, fit

CPU = torch.device("cpu")
SETTINGS = [Setting(lr, decay) for lr in LEARNING_RATES for decay in WEIGHT_DECAYS]


@pytest.fixture(scope="module")
def digits() -> tuple[Features, Features]:
    """Training and validation features: the 64 grey values of scikit-learn's digits."""
    images, labels = load_digits(return_X_y=True)
    order = torch.from_numpy(epoch_order(len(labels), 0, 0))
    everything = Features(torch.tensor(images, dtype=torch.float32), torch.tensor(labels), torch.arange(len(labels)))
    return tuple(Features(*(column[part] for column in everything)) for part in (order[:1400], order[1400:]))


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cached, "MIN_STEPS", 40)


def accuracy(train: Features, val: Features, setting: Setting) -> float:
    return int(fit(train, [setting], 10, seed=0, device=CPU).count_hits(val)[0, 0]) / len(val.labels)


def test_it_is_as_good_as_scikit_learns_logistic_regression(digits):
    train, val = digits
    scaler = StandardScaler().fit(train.features)
    reference = LogisticRegression(C=1.0, max_iter=1000).fit(scaler.transform(train.features), train.labels)
    expected = reference.score(scaler.transform(val.features), val.labels)
    chosen = choose(train, SETTINGS, 10, seed=0, device=CPU)
    assert accuracy(train, val, chosen) == pytest.approx(expected, abs=0.012)


def test_layers_trained_together_are_those_trained_alone(digits, few_steps):
    train, _ = digits
    settings = [Setting(0.1, 0.0), Setting(3.0, 1e-2), Setting(10.0, 0.0)]
    together = fit(train, settings, 10, seed=0, device=CPU)
    for i, setting in enumerate(settings):
        alone = fit(train, [setting], 10, seed=0, device=CPU)
        torch.testing.assert_close(together.weight[:, 10 * i : 10 * (i + 1)], alone.weight, rtol=1e-3, atol=1e-4)


def test_the_written_out_gradient_is_autograds(digits, monkeypatch):
    monkeypatch.setattr(linear_cached, "MIN_EPOCHS", 2)
    monkeypatch.setattr(linear_cached, "MIN_STEPS", 2)
    train, setting = digits[0], Setting(2.0, 0.05)
    layer = torch.nn.Linear(64, 10)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": 0.05}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=2.0, momentum=0.9)
    standardise, step = Standardise.fit(train.features), 0
    for epoch in range(2):
        for rows in torch.from_numpy(epoch_order(1400, 0, epoch)).split(256):
            for group in optimizer.param_groups:
                group["lr"] = 2.0 * (0.5 + 0.5 * math.cos(math.pi * step / 12))
            loss = torch.nn.functional.cross_entropy(layer(standardise(train.features[rows])), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    found = fit(train, [setting], 10, seed=0, device=CPU)
    torch.testing.assert_close(found.weight.T, layer.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.bias, layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_neither_scale_nor_offset_of_the_features_matters(digits, few_steps):
    train, val = digits
    setting = Setting(10.0, 0.0)
    moved = [data._replace(features=data.features * 1000 + 50) for data in digits]
    assert accuracy(*moved, setting) == pytest.approx(accuracy(train, val, setting), abs=0.003)


def test_dimensions_that_never_vary_are_ignored():
    features = torch.cat([torch.randn(50, 3), torch.full((50, 2), 7.0)], dim=1)
    standardised = Standardise.fit(features)(features)
    assert (standardised[:, 3:] == 0).all()
    assert standardised.square().sum(dim=1).mean().item() == pytest.approx(1, abs=1e-5)


def test_a_useless_setting_is_not_chosen(digits, few_steps):
    good = Setting(10.0, 0.0)
    assert choose(digits[0], [Setting(1e-6, 0.0), good, Setting(10.0, 10.0)], 10, seed=0, device=CPU) == good


def test_the_choice_is_made_on_samples_that_did_not_train(digits, few_steps, monkeypatch):
    seen = []

    def watch(owner: object, name: str, samples_at: int) -> None:
        original = getattr(owner, name)

        def watched(*arguments, **more):
            seen.append(set(arguments[samples_at].indices.tolist()))
            return original(*arguments, **more)

        monkeypatch.setattr(owner, name, watched)

    watch(linear_cached, "fit", 0)
    watch(linear_cached.LinearLayers, "count_hits", 1)
    choose(digits[0], SETTINGS[:2], 10, seed=0, device=CPU)
    trained_on, held_out = seen
    assert len(held_out) == 140
    assert not trained_on & held_out
    assert trained_on | held_out == set(digits[0].indices.tolist())


def test_it_gives_the_same_answer_twice(digits, few_steps):
    first, second = (fit(digits[0], SETTINGS[:3], 10, seed=4, device=CPU).weight for _ in range(2))
    assert torch.equal(first, second)
