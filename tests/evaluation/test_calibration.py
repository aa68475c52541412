"""Calibration: the error by its definition, and the posterior by VarCon's own loss."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from varscale.config import VarConConfig, VSSLConfig
from varscale.errors import UserError
from varscale.evaluation.calibration import Settings, calibration_error, class_logits, draw, run
from varscale.evaluation.features import Features
from varscale.objectives.varcon import varcon_loss


def by_hand(posterior: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """The definition in Guo et al., section 2, one bin after the other."""
    confidence, predicted = posterior.max(axis=1), posterior.argmax(axis=1)
    error = 0.0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if inside.any():
            gap = abs((predicted == labels)[inside].mean() - confidence[inside].mean())
            error += inside.sum() / len(labels) * gap
    return error


@pytest.mark.parametrize("bins", [2, 15])
def test_the_error_is_the_published_definition(bins):
    random = np.random.default_rng(0)
    posterior = random.dirichlet(np.full(6, 0.4), 800)
    labels = np.array([random.choice(6, p=0.7 * p + 0.05) for p in posterior])
    found, table = calibration_error(torch.from_numpy(posterior), torch.from_numpy(labels), bins)
    assert found == pytest.approx(by_hand(posterior, labels, bins), abs=1e-12)
    assert 0.02 < found < 0.5
    assert sum(row["count"] for row in table) == 800


def test_scikit_learns_curve_has_the_same_bins():
    from sklearn.calibration import calibration_curve

    random = np.random.default_rng(1)
    second = random.uniform(0.5, 1, 500)
    posterior = np.stack([1 - second, second], axis=1)
    labels = (random.uniform(size=500) < second**2).astype(int)
    fraction, mean = calibration_curve(labels, second, n_bins=10)
    _, table = calibration_error(torch.from_numpy(posterior), torch.from_numpy(labels), 10)
    rows = [row for row in table if row["count"]]
    assert [row["accuracy"] for row in rows] == pytest.approx(fraction.tolist())
    assert [row["confidence"] for row in rows] == pytest.approx(mean.tolist())


def test_a_sure_and_right_posterior_has_no_error():
    assert calibration_error(torch.eye(4), torch.arange(4), 15)[0] == 0
    assert calibration_error(torch.eye(4), (torch.arange(4) + 1) % 4, 15)[0] == 1


def test_nll_is_that_of_varcons_objective_on_its_own_batch(on_features, make_clouds):
    batch = make_clouds(60, 5, 1)
    batch = batch._replace(features=F.normalize(batch.features))
    _, terms = varcon_loss(batch.features, batch.labels, 5, temperature=0.3, epsilon=0.1)
    result = run(on_features(batch, batch, 5), Settings(temperature=0.3, epsilon=0.1))
    assert result.metrics["nll"] == pytest.approx(terms["nll"].item(), rel=1e-5)
    assert result.units["nll"] == result.units["ece"] == ""
    assert "top1" not in result.units
    assert result.metrics["nll_adaptive"] != pytest.approx(result.metrics["nll"])


def test_the_runs_own_temperatures_are_taken(on_features, make_clouds):
    data = make_clouds(60, 5, 2)
    objective = VarConConfig(temperature=0.2, epsilon=0.05)
    head = torch.nn.Identity()
    own = run(on_features(data, data, 5, objective=objective, head=head), Settings())
    same = run(on_features(data, data, 5), Settings(temperature=0.2, epsilon=0.05, layer="features"))
    assert (own.settings["temperature"], own.settings["epsilon"]) == (0.2, 0.05)
    assert own.notes == ()
    assert own.metrics["nll"] == pytest.approx(same.metrics["nll"], rel=0.3)
    other = run(on_features(data, data, 5, objective=VSSLConfig()), Settings())
    assert other.settings["temperature"] == 0.1
    assert "no projection head" in other.notes[0]
    assert "0.1 was taken" in other.notes[1]


def test_without_epsilon_the_adaptive_temperature_is_the_fixed_one(on_features, make_clouds):
    data = make_clouds(60, 5, 3)
    metrics = run(on_features(data, data, 5), Settings(temperature=0.1, epsilon=0)).metrics
    assert metrics["ece_adaptive"] == pytest.approx(metrics["ece"])


def test_an_epsilon_as_large_as_the_temperature_is_refused(on_features, make_clouds):
    data = make_clouds(20, 2, 3)
    with pytest.raises(UserError, match=r"calibration.epsilon is 0.2, but it must be smaller"):
        run(on_features(data, data, 2), Settings(temperature=0.2, epsilon=0.2))


def test_classes_without_training_images_have_no_probability(make_clouds):
    data = make_clouds(12, 3, 4)
    points = F.normalize(data.features)
    logits = class_logits(points, data.labels, points, 5)
    assert (logits[:, 3:] == -math.inf).all()
    assert logits[:, :3].isfinite().all()


def test_the_picture_has_both_temperatures(on_features, make_clouds):
    data = make_clouds(60, 5, 5)
    figure = draw(run(on_features(data, data, 5), Settings()).details)
    assert {axis.get_title() for axis in figure.axes} >= {"fixed temperature", "confidence-adaptive temperature"}


def test_details_of_one_sample_are_whole(on_features, make_clouds):
    data = make_clouds(6, 2, 5)
    one = Features(*(column[:1] for column in data))
    details = run(on_features(data, one, 2), Settings()).details
    assert [row["count"] for row in details["reliability"] if row["count"]] == [1]
