"""Counting top-1 and top-5 hits."""

import numpy as np
import torch
from sklearn.metrics import top_k_accuracy_score

from varscale.evaluation.context import count_hits, percent


def test_hits_are_scikit_learns_top_k_accuracy():
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=(200, 9)), random.integers(0, 9, 200)
    expected = [top_k_accuracy_score(labels, scores, k=k, normalize=False, labels=range(9)) for k in (1, 5)]
    assert count_hits(torch.from_numpy(scores), torch.from_numpy(labels)).tolist() == expected


def test_of_equal_scores_the_lower_class_comes_first():
    scores = torch.ones(3, 8)
    assert count_hits(scores, torch.tensor([0, 4, 5])).tolist() == [1, 2]


def test_scores_that_are_not_numbers_hit_nothing():
    scores = torch.tensor([[float("nan")] * 6, [0.0, 1.0, float("nan"), 0.0, 0.0, 0.0]])
    assert count_hits(scores, torch.tensor([0, 1])).tolist() == [0, 1]


def test_percent():
    assert percent(torch.tensor(3), 8) == 37.5
