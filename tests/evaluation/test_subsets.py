"""Balanced subsets of samples."""

import numpy as np
import torch

from varscale.evaluation.subsets import balanced, per_class

LABELS = torch.tensor([0] * 50 + [1] * 30 + [2] * 4)


def counts(rows: np.ndarray) -> list[int]:
    return np.bincount(LABELS.numpy()[rows], minlength=3).tolist()


def test_every_class_gives_as_many_or_all_it_has():
    assert counts(balanced(LABELS, 12, 0)) == [4, 4, 4]
    assert counts(balanced(LABELS, 24, 0)) == [10, 10, 4]
    assert balanced(LABELS, 500, 0).tolist() == list(range(84))


def test_quotas_are_kept_class_by_class():
    assert counts(per_class(LABELS, np.array([3, 0, 9]), 0, 0)) == [3, 0, 4]


def test_a_choice_is_a_function_of_seed_and_draw():
    quotas = np.array([5, 5, 2])
    first = per_class(LABELS, quotas, 1, 0)
    assert first.tolist() == per_class(LABELS, quotas, 1, 0).tolist()
    assert first.tolist() != per_class(LABELS, quotas, 1, 1).tolist()
    assert first.tolist() != per_class(LABELS, quotas, 2, 0).tolist()
    assert (np.diff(first) > 0).all()


def test_more_shots_contain_the_fewer_ones():
    few, many = (set(per_class(LABELS, np.full(3, n), 0, 0)) for n in (2, 4))
    assert few < many
