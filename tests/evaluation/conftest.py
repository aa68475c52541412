"""A context on features that a test makes up, and what several evaluators are tried on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from varscale.evaluation.context import Context, Place
from varscale.evaluation.features import Features


def clouds(count: int, classes: int, seed: int, *, spread: float = 1.0, dimensions: int = 12) -> Features:
    """Overlapping clouds of points, one a class."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(0).normal(size=(classes, dimensions))
    points = centres[labels] + spread * random.normal(size=(count, dimensions))
    return Features(torch.tensor(points, dtype=torch.float32), torch.from_numpy(labels), torch.arange(count))


@pytest.fixture(scope="session")
def on_features():
    """A function: a context whose encoder gave these features; whatever would need images fails."""

    def make(train: Features, val: Features, classes: int, **more) -> Context:
        names = tuple(f"class {c}" for c in range(classes))
        images = SimpleNamespace(seed=0, classes=names, num_classes=classes)
        context = Context(encode=None, images=images, place=Place(torch.device("cpu")), **more)
        context.__dict__ |= {"train": train, "val": val}
        return context

    return make


@pytest.fixture(scope="session")
def make_clouds():
    return clouds
