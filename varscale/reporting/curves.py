"""How training went: curves of all runs over each other, and how VarCon's temperatures were distributed by epoch."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from varscale.engine.metrics import MEASURED
from varscale.reporting.content import Picture
from varscale.reporting.plotting import legend, picture
from varscale.reporting.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = Callable[[dict], float | None]  # of a line, in which "weights" are those of its run's terms
MOST_POINTS = 500  # of a curve; of more, neighbours are averaged


class Curve(NamedTuple):
    """One panel: a value of the lines of one kind, and the band around it where it has one."""

    name: str
    title: str
    value: Value
    kind: str = "train"
    band: tuple[Value, Value] | None = None


def _key(name: str) -> Value:
    return lambda line: line.get(name)


def _share(name: str) -> Value:
    """Of VarCon's loss, in which the terms have weights; VSSL's likelihood may be negative."""

    def share(line: dict) -> float | None:
        terms = {term: line.get(term) for term in ("kl", "nll")}
        if "tau2" not in line or None in terms.values():
            return None
        parts = {term: line["weights"][term] * value for term, value in terms.items()}
        return parts[name] / whole if (whole := sum(parts.values())) > 0 else None

    return share


def _tau2_less(deviations: float) -> Value:
    """tau2 less so many standard deviations, where these were recorded."""
    return lambda line: None if "tau2_std" not in line else line["tau2"] - deviations * line["tau2_std"]


def _knn(line: dict) -> float | None:
    return next((value for name, value in line.items() if name.startswith("top1_k")), None)


CURVES = (
    Curve("loss", "loss", _key("loss")),
    Curve("kl", "KL", _key("kl")),
    Curve("nll", "negative log-likelihood (NLL)", _key("nll")),
    Curve("kl-share", "KL's share of VarCon's loss", _share("kl")),
    Curve("nll-share", "NLL's share of VarCon's loss", _share("nll")),
    Curve("knn", "kNN top-1 while training (%)", _knn, "knn"),
    Curve("learning-rate", "learning rate", _key("lr")),
    Curve("gradient-norm", "gradient norm", _key("gradient_norm")),
    Curve(
        "tau2",
        "adaptive temperature tau2: mean and deviation",
        _key("tau2"),
        band=(_tau2_less(1), _tau2_less(-1)),
    ),
    Curve("confidence", "confidence p(r|z)", _key("confidence")),
    Curve("classes-present", "classes in a batch", _key("classes_present")),
    Curve("cosine", "cosine between outputs for an image's views (SupCon: for a class)", _key("cosine")),
    Curve("spread", "spread of the latents (0: collapsed)", _key("spread")),
    Curve("effective-rank", "effective rank of the latents (1: on a line)", _key("effective_rank")),
    Curve(
        "logvar",
        "log variance of the student: mean, least, greatest",
        _key("logvar_mean"),
        band=(_key("logvar_min"), _key("logvar_max")),
    ),
)
# Keys of lines that these show, that throughput shows, or that say which line it is.
SHOWN = {"loss", "kl", "nll", "lr", "gradient_norm", "tau2", "tau2_std", "confidence", "classes_present", "cosine"}
SHOWN |= {
    "spread",
    "effective_rank",
    "logvar_mean",
    "logvar_min",
    "logvar_max",
    "kind",
    "step",
    "time",
    "epoch",
    *MEASURED,
}


def curves(runs: Sequence[Run]) -> list[Picture]:
    """A picture for each of `CURVES` that any of the runs recorded, and for each other number that is not always 0."""
    position = _position(runs)
    found = []
    for curve in (*CURVES, *_others(runs)):
        having = [run for run in runs if any(curve.value(line) is not None for line in _lines(run, curve))]
        if having:
            found.append(picture(curve.name, curve.title, partial(_draw, curve=curve, runs=having, position=position)))
    return found


def _lines(run: Run, curve: Curve) -> list[dict]:
    objective = run.config["objective"]
    weights = {term: objective.get(f"{term}_weight", 1.0) for term in ("kl", "nll")}
    return [line | {"weights": weights} for line in run.series(curve.kind)]


def _others(runs: Sequence[Run]) -> list[Curve]:
    lines = [line for run in runs for line in run.series("train")]
    names = {key for line in lines for key, value in line.items() if isinstance(value, int | float) and value}
    return [Curve(name.replace("_", "-"), name.replace("_", " "), _key(name)) for name in sorted(names - SHOWN)]


def _position(runs: Sequence[Run]) -> str:
    """The epoch, unless some run recorded steps only."""
    lines = [line for run in runs for line in run.lines if line["kind"] in ("train", "knn")]
    return "epoch" if all("epoch" in line for line in lines) else "step"


def _draw(axis: "Axes", curve: Curve, runs: list[Run], position: str) -> None:
    handles = []
    for run in runs:
        lines = [line for line in _lines(run, curve) if curve.value(line) is not None]
        colour = run.look.colour
        x = _thin([line[position] for line in lines])
        marker = "o" if len(lines) <= 30 else None
        drawn = {"color": colour, "linestyle": run.look.line, "marker": marker, "markersize": 2.5}
        handles += axis.plot(x, _thin(map(curve.value, lines)), **drawn)
        if curve.band:
            low, high = (_thin(map(edge, lines)) for edge in curve.band)
            axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set_xlabel(position)
    legend(axis, handles, [run.look.name for run in runs])


def _thin(values) -> np.ndarray:
    """(N,) -> at most `MOST_POINTS` means of equally many neighbours."""
    array = np.array([math.nan if value is None else value for value in values], dtype=float)
    together = math.ceil(len(array) / MOST_POINTS) or 1
    return np.array([part.mean() for part in np.split(array, range(together, len(array), together))])


def histograms(runs: Sequence[Run]) -> list[Picture]:
    """For each run that recorded it, the distribution of tau2 (and the confidence it follows) by epoch."""
    found = []
    for number, run in enumerate(runs):
        lines = [line for line in run.series("train") if line.get("tau2_histogram") and "epoch" in line]
        if lines:
            title = f"{run.name}: distribution of tau2 by epoch"
            name = f"tau2-histogram-{number + 1}"
            found.append(picture(name, title, partial(_draw_histogram, run=run, lines=lines), width=4.6))
    return found


def by_epoch(lines: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """The epochs, counted from 1, and for each the sum of its lines' histograms as shares: (E,), (E, bins).

    A line tells of all steps since the one before, and counts for the epoch in which it ends.
    """
    epochs = np.array([math.ceil(line["epoch"] - 1e-9) for line in lines])
    counts = np.array([line["tau2_histogram"] for line in lines], dtype=float)
    present = np.unique(epochs)
    sums = np.stack([counts[epochs == epoch].sum(axis=0) for epoch in present])
    return present, sums / sums.sum(axis=1, keepdims=True)


def _draw_histogram(axis: "Axes", run: Run, lines: Sequence[dict]) -> None:
    from matplotlib.colors import PowerNorm

    epochs, shares = by_epoch(lines)
    tau1, epsilon = run.config["objective"]["temperature"], run.config["objective"]["epsilon"]
    low, high, label = tau1 - epsilon, tau1 + epsilon, "tau2, from confidence 0 to 1"
    if not epsilon:
        low, high, label = 0.0, 1.0, "confidence p(r|z)"
    image = np.full((shares.shape[1], epochs[-1]), np.nan)
    image[:, epochs - 1] = shares.T
    extent = (0.5, epochs[-1] + 0.5, low, high)
    how = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}
    # Most samples end in the last bin: the square root lets the others be seen.
    shown = axis.imshow(image, "viridis", extent=extent, norm=PowerNorm(0.5, vmin=0), **how)
    axis.set(xlabel="epoch", ylabel=label)
    axis.grid(False)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.figure.colorbar(shown, label="share of samples")
