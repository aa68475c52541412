"""Dispersion by its definitions, one pair at a time."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from varscale.evaluation.dispersion import Settings, centroid_distance, draw, pair_cosines, run


def test_cosines_of_all_pairs(make_clouds):
    data = make_clouds(23, 4, 1)
    points = F.normalize(data.features)
    same, different = {c: [] for c in range(4)}, []
    for i, j in itertools.combinations(range(23), 2):
        cosine = float(points[i] @ points[j])
        (same[int(data.labels[i])] if data.labels[i] == data.labels[j] else different).append(cosine)
    intra, inter = pair_cosines(points, data.labels)
    assert intra == pytest.approx(np.mean([np.mean(values) for values in same.values()]), abs=1e-6)
    assert inter == pytest.approx(np.mean(different), abs=1e-6)


def test_a_class_of_one_image_has_no_pairs():
    intra, _ = pair_cosines(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), torch.tensor([0, 0, 1]))
    assert intra == pytest.approx(1)


def test_the_posterior_is_sharper_at_a_lower_temperature(on_features, make_clouds):
    train, val = make_clouds(60, 4, 2), make_clouds(40, 4, 3)
    metrics = run(on_features(train, val, 4), Settings(temperatures=(0.05, 0.2, 1.0))).metrics
    assert metrics["entropy_t0.05"] < metrics["entropy_t0.2"] < metrics["entropy_t1"] < 1
    assert metrics["confidence_t0.05"] > metrics["confidence_t1"] > 0.25
    bank, points = F.normalize(train.features).double(), F.normalize(val.features).double()
    centroids = F.normalize(torch.stack([bank[train.labels == c].mean(dim=0) for c in range(4)]))
    p = (points @ centroids.T / 0.2).softmax(dim=1)
    assert metrics["confidence_t0.2"] == pytest.approx(p[torch.arange(40), val.labels].mean().item(), abs=1e-5)
    assert metrics["entropy_t0.2"] == pytest.approx(-(p * p.log()).sum(dim=1).mean().item() / np.log(4), abs=1e-5)
    own = (points - centroids[val.labels]).norm(dim=1).mean().item()
    assert metrics["own_distance"] == pytest.approx(own, abs=1e-4)
    assert metrics["centroid_distance"] == pytest.approx(torch.pdist(centroids).mean().item(), abs=1e-5)
    assert metrics["separation"] == pytest.approx(metrics["centroid_distance"] / own, rel=1e-3)


def test_orthogonal_classes_are_the_square_root_of_two_apart():
    points = torch.eye(3)[[0, 1, 2, 0]]
    assert centroid_distance(points, torch.tensor([0, 1, 2, 0])) == pytest.approx(2**0.5)


@pytest.mark.parametrize(("points", "separation"), [(torch.ones(3, 8), np.nan), (torch.eye(3), np.inf)])
def test_points_without_distance_to_their_centroid_are_measured(on_features, make_clouds, points, separation):
    samples = make_clouds(12, 3, 6)
    samples = samples._replace(features=points[samples.labels])
    metrics = run(on_features(samples, samples, 3), Settings()).metrics
    assert metrics["separation"] == pytest.approx(separation, nan_ok=True)
    assert (metrics["own_distance"], metrics["intra_cosine"]) == pytest.approx((0, 1), abs=1e-6)


def test_margins_tell_right_from_wrong(on_features, make_clouds):
    data = make_clouds(40, 4, 4, spread=0.1)
    wrong = data._replace(labels=(data.labels + 1) % 4)
    assert run(on_features(data, data, 4), Settings()).metrics["margin"] > 0
    result = run(on_features(data, wrong, 4), Settings())
    assert result.metrics["margin"] < 0
    assert set(result.units.values()) == {""}
    assert sum(result.details["own"]["counts"]) == 40
    assert draw(result.details).axes[0].get_xlabel() == "cosine"


def test_classes_without_training_images_are_named(on_features, make_clouds):
    train, val = make_clouds(40, 4, 1), make_clouds(50, 5, 2)
    result = run(on_features(train, val, 5), Settings())
    assert result.notes[-1] == "no training images of 1 class(es), which have no centroid: class 4"
    assert run(on_features(val, val, 5), Settings()).notes == run(on_features(train, train, 4), Settings()).notes
    alone = make_clouds(4, 4, 3)
    assert "no pairs within a class" in run(on_features(train, alone, 4), Settings()).notes[-1]
