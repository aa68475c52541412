"""kNN accuracy against a brute-force version, against scikit-learn, and at its edges."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from varscale.evaluation import knn
from varscale.evaluation.features import Features
from varscale.evaluation.knn import knn_accuracy, nearest, votes

CPU = torch.device("cpu")


def samples(count: int, classes: int, seed: int) -> Features:
    """Overlapping clouds of points, one a class, whose length says nothing."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    centres = np.random.default_rng(0).normal(size=(classes, 12))
    points = (centres[labels] + 1.5 * random.normal(size=(count, 12))) * random.uniform(0.1, 10, (count, 1))
    return Features(torch.tensor(points, dtype=torch.float32), torch.from_numpy(labels), torch.arange(count))


def by_hand(train: Features, val: Features, classes: int, k: int, temperature: float) -> tuple[float, float]:
    """The definition, one sample at a time in float64."""
    bank = train.features.double().numpy()
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    first = five = 0
    for query, label in zip(val.features.double().numpy(), val.labels.tolist(), strict=True):
        similarities = bank @ (query / np.linalg.norm(query))
        scores = np.zeros(classes)
        for i in np.argsort(-similarities)[:k]:
            scores[train.labels[i]] += np.exp(similarities[i] / temperature)
        ranking = np.argsort(-scores, kind="stable").tolist()
        first += ranking[0] == label
        five += label in ranking[:5]
    return 100 * first / len(val.labels), 100 * five / len(val.labels)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "BANK_CHUNK", 37)
    monkeypatch.setattr(knn, "QUERY_CHUNK", 16)


@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_it_is_the_definition_whatever_the_chunks(small_chunks, temperature):
    train, val = samples(300, 8, seed=1), samples(111, 8, seed=2)
    found = knn_accuracy(train, val, 8, k=(5, 50), temperature=temperature, device=CPU)
    for k in (5, 50):
        assert (found[f"top1_k{k}"], found[f"top5_k{k}"]) == by_hand(train, val, 8, k, temperature)
    assert 30 < found["top1_k50"] < 95


def test_with_equal_votes_it_is_scikit_learns_classifier():
    train, val = samples(400, 6, seed=3), samples(200, 6, seed=4)
    for k in (1, 7, 40):
        reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train.features, train.labels)
        expected = 100 * float((reference.predict(val.features) == val.labels.numpy()).sum()) / 200
        assert knn_accuracy(train, val, 6, k=(k,), temperature=1e12, device=CPU)[f"top1_k{k}"] == expected


def test_more_neighbours_than_samples_means_all_of_them():
    train, val = samples(30, 4, seed=5), samples(50, 4, seed=6)
    found = knn_accuracy(train, val, 4, k=(30, 200), device=CPU)
    assert found["top1_k200"] == found["top1_k30"]


def test_top_5_of_fewer_than_five_classes_is_all_of_them():
    found = knn_accuracy(samples(30, 3, seed=7), samples(20, 3, seed=8), 3, k=(5,), device=CPU)
    assert found["top5_k5"] == 100


def test_nearest_finds_rows_across_chunks_in_order(small_chunks):
    bank = samples(200, 4, seed=9).features
    similarities, rows = nearest(bank, bank[60:100] * 3, 4, CPU)
    assert rows[:, 0].tolist() == list(range(60, 100))
    torch.testing.assert_close(similarities[:, 0], torch.ones(40))
    assert (similarities.diff(dim=1) <= 0).all()


def test_votes_do_not_overflow_at_a_small_temperature():
    similarities, labels = torch.tensor([[1.0, 0.999, -1.0]]), torch.tensor([[2, 0, 1]])
    torch.testing.assert_close(
        votes(similarities, labels, 3, 1e-3), torch.tensor([[np.exp(-1.0), 0.0, 1.0]], dtype=torch.float32)
    )


def test_neighbours_are_in_the_layer_asked_for(on_features, make_clouds):
    train, val = make_clouds(120, 4, 1), make_clouds(80, 4, 2)
    head = torch.nn.Linear(12, 3)
    of_features, of_embeddings = (
        knn.run(on_features(train, val, 4, head=head), knn.Settings(k=(9,), layer=layer))
        for layer in ("features", "embeddings")
    )
    heads = (samples._replace(features=head(samples.features).detach()) for samples in (train, val))
    assert of_embeddings.metrics == knn_accuracy(*heads, 4, k=(9,), device=CPU)
    assert of_features.metrics == knn_accuracy(train, val, 4, k=(9,), device=CPU)
    assert of_features.metrics != of_embeddings.metrics
    assert (of_features.variant, of_embeddings.variant) == ("", "embeddings"), "neither takes the other's place"
    assert "stand for embeddings" in knn.run(on_features(train, val, 4), knn.Settings(layer="embeddings")).notes[0]


def test_ranks_share_the_queries_and_sum_up():
    train, val = samples(200, 5, seed=10), samples(1300, 5, seed=11)
    alone = knn_accuracy(train, val, 5, k=(9,), device=CPU)
    hits: list[torch.Tensor] = []

    def collect(rows: torch.Tensor) -> torch.Tensor:
        hits.append(rows)
        return torch.cat(hits)

    for rank in range(3):
        last = knn_accuracy(train, val, 5, k=(9,), device=CPU, rank=rank, world_size=3, gather=collect)
    assert last == alone
    assert all(part.sum() > 0 for part in hits)
