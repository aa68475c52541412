"""Alignment and uniformity (Wang & Isola, arXiv 2005.10242): two views of an image together, all images apart."""

import math

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from varscale.config import Section
from varscale.evaluation.context import NUMBER, Context, Result
from varscale.evaluation.subsets import balanced

ROWS = 1024


class Settings(Section):
    """alpha, t: as in the paper. samples: validation images, each in two views."""

    alpha: PositiveFloat = 2.0
    t: PositiveFloat = 2.0
    samples: PositiveInt = 5_000


def run(context: Context, settings: Settings) -> Result:
    """Alignment, the mean of ||x - y||^alpha over pairs of views of one image, and uniformity, log mean exp(-t ||x -
    y||^2) over pairs of images, of unit-norm features and of embeddings; both are better where they are lower.

    The views are those of validation images under the augmentation of training, a function of the run's seed;
    uniformity is the mean over the two views.
    """
    order = balanced(context.val.labels, settings.samples, context.images.seed)
    views = [context.view("val", order, view).features for view in (0, 1)]
    metrics = {}
    for layer in ("features", "embeddings") if context.head is not None else ("features",):
        first, second = (context.project(view, layer) for view in views)
        metrics[f"alignment_{layer}"] = alignment(first, second, settings.alpha)
        metrics[f"uniformity_{layer}"] = (uniformity(first, settings.t) + uniformity(second, settings.t)) / 2
    described = settings.model_dump() | {"samples_used": len(order), "augmentation": context.images.policy}
    notes = () if context.head is not None else ("there is no projection head: features only",)
    return Result(metrics, described, notes, dict.fromkeys(metrics, NUMBER))


def alignment(first: Tensor, second: Tensor, alpha: float) -> float:
    """Mean of ||x - y||^alpha over the rows of `first` and `second`, (N, D) unit-norm."""
    return (first - second).double().norm(dim=1).pow(alpha).mean().item()


def uniformity(points: Tensor, t: float) -> float:
    """log of the mean of exp(-t ||x - y||^2) over pairs of different rows of `points: (N, D)`, unit-norm."""
    points, count = points.double(), len(points)
    if count < 2:
        return math.nan
    total = 0.0
    for start in range(0, count, ROWS):
        part = points[start : start + ROWS]
        kernel = torch.exp(2 * t * (part @ points.T - 1))  # ||x - y||^2 = 2 - 2 x.y
        kernel[torch.arange(len(part)), torch.arange(start, start + len(part))] = 0.0
        total += kernel.sum().item()
    return math.log(total / (count * (count - 1)))
