"""Calibration of VarCon's posterior: how far its confidence in a class can be believed on images not trained on."""

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from varscale.config import Section
from varscale.errors import UserError
from varscale.evaluation.context import NUMBER, Context, Layer, Result, count_hits, percent
from varscale.objectives.centroids import local_statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPERATURE = 0.1  # where the run's objective has none


class Settings(Section):
    """temperature, epsilon: tau1 and eps of the posterior, null for the run's own. bins: of the confidence."""

    temperature: PositiveFloat | None = None
    epsilon: NonNegativeFloat | None = None
    bins: Annotated[int, Field(ge=2)] = 15
    layer: Layer = "embeddings"


def run(context: Context, settings: Settings) -> Result:
    """p(r|z) (eq. 8 of VarCon, arXiv 2506.07413) of validation embeddings against the centroids of the training
    embeddings, both of the evaluation crop, as a classifier: accuracy, mean -log p of the true class in nats, and the
    expected calibration error.

    The `adaptive` numbers divide by VarCon's tau2 = (tau1 - eps) + 2 eps p (eq. 13) in place of tau1. The true class
    being unknown here, p is that of the likeliest class: sure samples are made softer, unsure ones sharper.
    """
    temperature, epsilon, notes = _temperatures(context, settings)
    notes += context.missing_notes()
    train, val = context.unit("train", settings.layer), context.unit("val", settings.layer)
    logits = class_logits(train.features, train.labels, val.features, context.num_classes)
    posterior = (logits / temperature).softmax(dim=1)
    tau2 = (temperature - epsilon) + 2 * epsilon * posterior.amax(dim=1, keepdim=True)
    metrics, details = {}, {"bins": settings.bins, "temperature": temperature, "epsilon": epsilon}
    for suffix, scaled in (("", logits / temperature), ("_adaptive", logits / tau2)):
        ece, table = calibration_error(scaled.softmax(dim=1), val.labels, settings.bins)
        metrics |= {f"nll{suffix}": F.cross_entropy(scaled, val.labels).item(), f"ece{suffix}": ece}
        details[f"reliability{suffix}"] = table
    units = dict.fromkeys(metrics, NUMBER)
    accuracy = percent(count_hits(logits, val.labels)[0], len(val.labels))
    described = {"temperature": temperature, "epsilon": epsilon, "bins": settings.bins, "layer": settings.layer}
    return Result({"top1": accuracy} | metrics, described, notes, units, details)


def class_logits(train: Tensor, train_labels: Tensor, val: Tensor, num_classes: int) -> Tensor:
    """z . w_r for unit-norm `val: (N, D)` and the unit-norm centroids w_r of `train: (M, D)`: (N, num_classes), -inf
    for classes that `train` lacks."""
    statistics = local_statistics(train, train_labels, num_classes)
    logits = val.new_full((len(val), num_classes), -torch.inf)
    logits[:, statistics.class_ids] = (val @ statistics.centroids().to(val).T).masked_fill(
        ~statistics.present, -torch.inf
    )
    return logits


def calibration_error(posterior: Tensor, labels: Tensor, bins: int) -> tuple[float, list[dict[str, float]]]:
    """The expected calibration error of Guo et al. (arXiv 1706.04599) of `posterior: (N, C)`, and its bins.

    Samples are sorted into `bins` equally wide bins by the probability of the class that is most probable; the error is
    the mean over samples of |accuracy - mean confidence| of their bin. Bin m holds (m / bins, (m + 1) / bins].
    """
    confidence, predicted = posterior.double().max(dim=1)
    correct = (predicted == labels).double()
    places = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    table, error = [], 0.0
    for m in range(bins):
        inside = places == m
        count = int(inside.sum())
        row = {"low": m / bins, "high": (m + 1) / bins, "count": count, "accuracy": None, "confidence": None}
        if count:
            row["accuracy"], row["confidence"] = correct[inside].mean().item(), confidence[inside].mean().item()
            error += count / len(labels) * abs(row["accuracy"] - row["confidence"])
        table.append(row)
    return error, table


def draw(details: dict) -> "Figure":
    """The reliability diagram: accuracy by confidence, with fixed and with adaptive temperature."""
    from varscale.evaluation.drawing import BLUE, GREY, ORANGE, new_figure

    figure, axes = new_figure(2)
    titles = {"reliability": "fixed temperature", "reliability_adaptive": "confidence-adaptive temperature"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        rows = [row for row in details[key] if row["count"]]
        total, width = sum(row["count"] for row in rows), 1 / details["bins"]
        low, accuracy, confidence = ([row[name] for row in rows] for name in ("low", "accuracy", "confidence"))
        axis.bar(low, accuracy, width, align="edge", color=BLUE, alpha=0.5, edgecolor="white", label="accuracy")
        axis.plot([0, 1], [0, 1], "--", color=GREY, label="as sure as right")
        axis.plot(confidence, accuracy, "o", color=ORANGE, label="at the mean confidence")
        shares = [row["count"] / total for row in details[key]]
        axis.stairs(shares, [*(row["low"] for row in details[key]), 1], color="black", label="share of images")
        axis.set(title=title, xlabel="confidence of the likeliest class", xlim=(0, 1), ylim=(0, 1.02))
    axes[0].set_ylabel("accuracy; share of images")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Calibration of p(r|z) on validation images")
    return figure


def _temperatures(context: Context, settings: Settings) -> tuple[float, float, tuple[str, ...]]:
    notes = context.layer_notes(settings.layer)
    temperature, epsilon = settings.temperature, settings.epsilon
    if temperature is None:
        temperature = getattr(context.objective, "temperature", None)
    if temperature is None:
        temperature = TEMPERATURE
        notes += (f"the run's objective has no temperature: {TEMPERATURE} was taken",)
    if epsilon is None:
        epsilon = getattr(context.objective, "epsilon", 0.0)
    if epsilon >= temperature:
        raise UserError(
            f"calibration.epsilon is {epsilon:g}, but it must be smaller than the temperature ({temperature:g}), or "
            "the adaptive temperature could reach zero"
        )
    return temperature, epsilon, notes
