"""Dispersion: how tightly a class lies together, how far classes lie apart, and how sharp a temperature makes that."""

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from varscale.config import Section
from varscale.evaluation.calibration import class_logits
from varscale.evaluation.context import NUMBER, Context, Layer, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HISTOGRAM_BINS = 100


class Settings(Section):
    """temperatures: of the posterior."""

    layer: Layer = "embeddings"
    temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.05, 0.1, 0.2)


def run(context: Context, settings: Settings) -> Result:
    """Of unit-norm validation embeddings z with classes r, and the unit-norm centroids w_r of the training embeddings:

    intra_cosine, inter_cosine: mean z.z' over pairs of different images of one class (every class counts alike), and of
        different classes (every pair of images counts alike).
    own_distance: mean ||z - w_r||. centroid_distance: mean ||w_r - w_s|| over pairs of classes. separation: the
        second divided by the first.
    margin: mean of z.w_r less the largest z.w_s of another class.
    At each temperature T, of p(s|z) = softmax(z.w_s / T), VarCon's eq. 8: `confidence`, the mean of p(r|z), and
        `entropy`, the mean entropy divided by log C, 1 where nothing is known. The embeddings are the run's, made with
        its own temperature: what a run at another T would give, only such a run tells.
    """
    train, val = context.unit("train", settings.layer), context.unit("val", settings.layer)
    intra, inter = pair_cosines(val.features, val.labels)
    logits = class_logits(train.features, train.labels, val.features, context.num_classes).double()
    own = logits.gather(1, val.labels[:, None]).squeeze(1)
    other = logits.scatter(1, val.labels[:, None], -torch.inf).amax(dim=1)
    distances = (2 - 2 * own).clamp(min=0).sqrt()
    between = centroid_distance(train.features, train.labels)
    metrics = {
        "intra_cosine": intra,
        "inter_cosine": inter,
        "own_distance": distances.mean().item(),
        "centroid_distance": between,
        "separation": (between / distances.mean()).item(),  # a tensor's division: not finite where all is one point
        "margin": (own - other).mean().item(),
    }
    for temperature in settings.temperatures:
        log_p = (logits / temperature).log_softmax(dim=1)
        p = log_p.exp()
        entropy = -torch.where(p > 0, p * log_p, 0.0).sum(dim=1).mean() / torch.tensor(context.num_classes).log()
        metrics[f"confidence_t{temperature:g}"] = p.gather(1, val.labels[:, None]).mean().item()
        metrics[f"entropy_t{temperature:g}"] = entropy.item()
    details = {"own": _histogram(own), "other": _histogram(other), "temperatures": list(settings.temperatures)}
    notes = context.layer_notes(settings.layer) + context.missing_notes()
    if len(val.labels.unique()) == len(val.labels):
        notes += ("every class has one validation image: there are no pairs within a class",)
    return Result(metrics, settings.model_dump(), notes, dict.fromkeys(metrics, NUMBER), details)


def pair_cosines(points: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cosine over pairs of different rows of `points: (N, D)`, unit-norm: of one class, averaged over classes, and
    of different classes. From sums alone: over all pairs of a set, z.z' sums to ||sum of z||^2."""
    points = points.double()
    classes, rows, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = points.new_zeros(len(classes), points.shape[1]).index_add(0, rows, points)
    squares = sums.square().sum(dim=1)
    own = points.new_zeros(len(classes)).index_add(0, rows, points.square().sum(dim=1))
    several = counts > 1
    intra = ((squares - own) / (counts * (counts - 1)))[several].mean()
    pairs = len(labels) ** 2 - counts.square().sum()
    inter = (sums.sum(dim=0).square().sum() - squares.sum()) / pairs
    return intra.item(), inter.item()


def centroid_distance(points: Tensor, labels: Tensor) -> float:
    """Mean Euclidean distance between the unit-norm class means of `points: (N, D)`, over pairs of classes."""
    classes, rows = labels.unique(return_inverse=True)
    sums = points.new_zeros(len(classes), points.shape[1]).double().index_add(0, rows, points.double())
    return torch.nn.functional.pdist(torch.nn.functional.normalize(sums)).mean().item()


def draw(details: dict) -> "Figure":
    """How like its own centroid an embedding is, and how like the nearest other one."""
    from varscale.evaluation.drawing import BLUE, ORANGE, new_figure

    figure, (axis,) = new_figure()
    shown = (("own", BLUE, "to the own class's centroid"), ("other", ORANGE, "to the nearest other centroid"))
    lowest = 1.0
    for key, colour, label in shown:
        shares = [count / max(1, sum(details[key]["counts"])) for count in details[key]["counts"]]
        lowest = min([lowest, *(edge for edge, share in zip(details[key]["edges"], shares, strict=False) if share)])
        axis.stairs(shares, details[key]["edges"], fill=True, color=colour, alpha=0.6, label=label)
    axis.set(
        xlim=(lowest - 0.04, 1.02),
        xlabel="cosine",
        ylabel="share of validation images",
        title="Likeness to class centroids",
    )
    axis.legend(loc="upper left")
    return figure


def _histogram(values: Tensor) -> dict[str, list[float]]:
    finite = values[values.isfinite()]
    edges = torch.linspace(-1, 1, HISTOGRAM_BINS + 1, dtype=torch.float64)
    counts = torch.histogram(finite.cpu().clamp(-1, 1), edges).hist
    return {"edges": [round(edge, 6) for edge in edges.tolist()], "counts": [int(count) for count in counts.tolist()]}
