"""Few-shot classification: how much of the labelled data the frozen features need."""

import math
from typing import TYPE_CHECKING, Annotated, Self

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from tqdm import tqdm

from varscale.config import Section
from varscale.evaluation.context import Context, Result
from varscale.evaluation.features import Features
from varscale.evaluation.subsets import per_class
from varscale.intervals import estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Percent = Annotated[float, Field(gt=0, le=100)]


class Settings(Section):
    """percent: of the training images of each class, at least one. shots: training images of each class. seeds: how
    many draws of each. c: of scikit-learn's logistic regression, the inverse weight of its penalty."""

    percent: tuple[Percent, ...] = (1, 2, 5, 10, 20)
    shots: tuple[PositiveInt, ...] = (1, 5, 10)
    seeds: PositiveInt = 5
    c: PositiveFloat = 10.0

    @model_validator(mode="after")
    def _something_to_measure(self) -> Self:
        if not self.percent and not self.shots:
            raise ValueError("few_shot.percent and few_shot.shots are both empty: nothing would be measured")
        return self


def run(context: Context, settings: Settings) -> Result:
    """Top-1 on all validation images of a logistic regression on the features of few labelled training images: the mean
    over draws, and half the width of its 95 % interval (Student's t) as `..._ci95`.

    Every class gives its share of the images. The features are moved to zero mean and scaled to a mean squared norm of
    1, both measured on the labelled images alone. The penalty is fixed beforehand for all: nothing is chosen, neither
    on validation images nor on others. The ranks share the draws.
    """
    train, val, seed = context.train, context.val, context.images.seed
    counts = np.bincount(train.labels.numpy(), minlength=context.num_classes)
    quotas = {f"top1_{p:g}pct": np.maximum(1, np.rint(counts * p / 100)).astype(int) for p in settings.percent}
    quotas |= {f"top1_{n}shot": np.full(len(counts), n) for n in settings.shots}
    draws = [(name, number) for name in quotas for number in range(settings.seeds)]
    bar = tqdm(total=len(draws), desc="few-shot", unit="fit", disable=not context.place.show_progress, leave=False)

    def fit(name_and_number: tuple[str, int]) -> float:
        name, number = name_and_number
        rows = per_class(train.labels, quotas[name], seed, number)
        accuracy = logistic_accuracy(*_take(train, rows), val, settings.c)
        bar.update(context.place.world_size)
        return accuracy

    metrics, details = {}, {}
    with bar:
        accuracies = dict(zip(draws, context.place.share(draws, fit), strict=True))
    for name, quota in quotas.items():
        found = [accuracies[name, number] for number in range(settings.seeds)]
        metrics[name], metrics[f"{name}_ci95"] = estimate(found)
        details[name] = {"images": int(np.minimum(quota, counts).sum()), "top1": found}
    described = settings.model_dump() | {"features": "centred, mean squared norm 1", "penalty": "l2, fixed beforehand"}
    short = [f"{n} shots: some classes have fewer images" for n in settings.shots if n > counts[counts > 0].min()]
    notes = ("one draw has no interval",) if settings.seeds == 1 else ()
    return Result(metrics, described, (*short, *notes), details=details)


def logistic_accuracy(features: Tensor, labels: Tensor, val: Features, c: float) -> float:
    """Top-1 in percent on `val` of the logistic regression of `features: (N, d)`, `labels: (N,)`."""
    from sklearn.linear_model import LogisticRegression

    mean = features.mean(dim=0)
    scale = (features - mean).square().sum(dim=1).mean().sqrt().clamp(min=1e-12)
    if len(labels.unique()) == 1:
        return 100 * (val.labels == labels[0]).float().mean().item()
    classifier = LogisticRegression(C=c, max_iter=1000).fit(((features - mean) / scale).numpy(), labels.numpy())
    hits = classifier.predict(((val.features - mean) / scale).numpy()) == val.labels.numpy()
    return 100 * int(hits.sum()) / len(hits)


def draw(details: dict) -> "Figure | None":
    """Accuracy by the number of labelled images, with its interval."""
    from varscale.evaluation.drawing import BLUE, ORANGE, new_figure

    figure, (axis,) = new_figure()
    for ending, colour, label in (("pct", BLUE, "a share of each class"), ("shot", ORANGE, "so many of each class")):
        rows = sorted((row["images"], row["top1"]) for name, row in details.items() if name.endswith(ending))
        if rows:
            estimates = [estimate([v for v in top1 if v is not None]) for _, top1 in rows]
            errors = [0.0 if math.isnan(one.half_width) else one.half_width for one in estimates]
            means = [one.mean for one in estimates]
            axis.errorbar([images for images, _ in rows], means, errors, fmt="o-", color=colour, capsize=3, label=label)
    axis.set(xscale="log", xlabel="labelled training images", ylabel="top-1 (%)")
    axis.set_title("Few-shot accuracy: mean and 95 % interval")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    return figure


def _take(samples: Features, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    places = torch.from_numpy(rows)
    return samples.features[places], samples.labels[places]
