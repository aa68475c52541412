"""Which samples an evaluator takes where not all are wanted: balanced over classes, a function of a seed."""

import numpy as np
from torch import Tensor

from varscale.data.sampling import epoch_order


def balanced(labels: Tensor, count: int | None, seed: int) -> np.ndarray:
    """Up to `count` samples, of each class as many as of any other or all there are: ascending indices (n,) int64.
    None: all samples."""
    order, occurrence = _occurrences(labels, seed, 0)
    return np.sort(order[np.argsort(occurrence, kind="stable")[:count]])


def per_class(labels: Tensor, quotas: np.ndarray, seed: int, draw: int) -> np.ndarray:
    """Of class c, `quotas[c]` samples or all there are; draws differ. quotas: (C,). Ascending indices (n,) int64."""
    order, occurrence = _occurrences(labels, seed, draw)
    return np.sort(order[occurrence < quotas[labels.numpy()[order]]])


def _occurrences(labels: Tensor, seed: int, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """A random order of the samples, and for each place in it how many of that sample's class come before."""
    order = epoch_order(len(labels), seed, draw)
    shuffled = labels.numpy()[order]
    by_class = np.argsort(shuffled, kind="stable")
    _, first, counts = np.unique(shuffled[by_class], return_index=True, return_counts=True)
    occurrence = np.empty(len(order), np.int64)
    occurrence[by_class] = np.arange(len(order)) - np.repeat(first, counts)
    return order, occurrence
