"""Clustering against scikit-learn, scipy and definitions."""

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.spatial.distance import pdist
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch.nn import functional as F

from varscale.evaluation.clustering import Settings, agreement, class_tree, draw, run, ward
from varscale.evaluation.features import Features


def test_kmeans_is_scikit_learns_on_unit_norm_features(on_features, make_clouds):
    train, val = make_clouds(90, 6, 1), make_clouds(120, 6, 2)
    found = run(on_features(train, val, 6), Settings(restarts=3)).metrics
    clusters = KMeans(6, n_init=3, random_state=0).fit_predict(F.normalize(val.features).numpy())
    assert found["kmeans_ari"] == pytest.approx(adjusted_rand_score(val.labels, clusters))
    assert found["kmeans_nmi"] == pytest.approx(normalized_mutual_info_score(val.labels, clusters))
    assert 0.2 < found["kmeans_ari"] < 1


def test_ward_is_scikit_learns(on_features, make_clouds):
    val = make_clouds(80, 4, 3)
    points = F.normalize(val.features)
    expected = AgglomerativeClustering(4, linkage="ward").fit_predict(points.numpy())
    assert adjusted_rand_score(ward(points, 4), expected) == 1
    found = run(on_features(val, val, 4), Settings()).metrics
    assert found["ward_ari"] == pytest.approx(adjusted_rand_score(val.labels, expected))


def test_purity_by_hand():
    labels, clusters = np.array([0, 0, 0, 1, 1, 2]), np.array([5, 5, 7, 7, 7, 5])
    assert agreement(labels, clusters)["purity"] == pytest.approx(100 * 4 / 6)


def test_samples_go_to_the_nearest_class_mean(on_features, make_clouds):
    train, val = make_clouds(90, 5, 4), make_clouds(100, 5, 5)
    found = run(on_features(train, val, 5), Settings()).metrics
    points, bank = F.normalize(val.features).double(), F.normalize(train.features).double()
    means = F.normalize(torch.stack([bank[train.labels == c].mean(dim=0) for c in range(5)]))
    expected = agreement(val.labels.numpy(), (points @ means.T).argmax(dim=1).numpy())
    assert {name: found[f"means_{name}"] for name in expected} == pytest.approx(expected)


def test_the_tree_is_scipys_average_linkage_of_cosines():
    means = np.random.default_rng(0).normal(size=(7, 5))
    correlation, tree = class_tree(means)
    distances = pdist(means, "cosine")
    expected = linkage(distances, "average")
    np.testing.assert_allclose(np.sort(tree[:, 2]), np.sort(expected[:, 2]))
    assert correlation == pytest.approx(np.corrcoef(cophenet(expected), distances)[0, 1])


def test_kindred_classes_join_first_in_details(on_features):
    directions = torch.eye(6)[[0, 1, 2, 3]]
    directions[1] = directions[0] + 0.2 * torch.eye(6)[5]  # class 1 beside class 0
    labels = torch.arange(40) % 4
    torch.manual_seed(0)
    data = Features(directions[labels] + 0.01 * torch.randn(40, 6), labels, torch.arange(40))
    result = run(on_features(data, data, 4), Settings())
    assert set(map(int, result.details["linkage"][0][:2])) == {0, 1}
    assert result.details["classes"] == [f"class {c}" for c in range(4)]
    assert result.metrics["kmeans_purity"] == 100
    assert "kmeans_purity" not in result.units
    assert result.units["kmeans_ari"] == result.units["cophenetic"] == ""
    labels_drawn = {text.get_text() for text in draw(result.details).axes[0].get_yticklabels()}
    assert labels_drawn == set(result.details["classes"])


def test_samples_are_bounded(on_features, make_clouds):
    data = make_clouds(100, 4, 6)
    settings = run(on_features(data, data, 4), Settings(samples=40, hierarchical_samples=20)).settings
    assert (settings["samples_used"], settings["hierarchical_samples_used"]) == (40, 20)


def test_two_classes_have_no_tree(on_features, make_clouds):
    data = make_clouds(20, 2, 7)
    result = run(on_features(data, data, 2), Settings())
    assert result.details == {}
    assert draw(result.details) is None
    assert "at least three classes" in result.notes[0]


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_a_collapsed_encoder_has_no_tree(on_features, make_clouds):
    data = make_clouds(60, 3, 1)
    for features in (data.features * 0, torch.ones_like(data.features)):
        same = data._replace(features=features)
        result = run(on_features(same, same, 3), Settings())
        assert "cophenetic" not in result.metrics
        assert result.notes[-1].endswith("no tree was made")
        assert draw(result.details) is None
