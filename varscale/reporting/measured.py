"""Pictures of what was measured: runs over each other where an evaluator's details allow it, else its own pictures."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from varscale.reporting.content import Picture, is_png
from varscale.reporting.plotting import INK, legend, picture
from varscale.reporting.runs import TRAINED, Run, data_of, label_of
from varscale.reporting.subjects import Subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REDRAWN = ("embedding_plot", "few_shot")  # evaluators whose own pictures say nothing more


def comparisons(subjects: Sequence[Subject]) -> list[Picture]:
    """Few-shot accuracy with its intervals, corruption by severity, and calibration, of all who were measured."""
    few = [(one, record) for one in subjects if (record := one.record("few_shot"))]
    found = []
    for ending, title in (("pct", "a share of the labels"), ("shot", "so many labels a class")):
        if any(name.endswith(ending) for _, record in few for name in record["details"]):
            name, heading = f"few-shot-{ending}", f"few-shot top-1 (%), {title}: mean and 95 % interval"
            found.append(picture(name, heading, partial(_draw_few_shot, few=few, ending=ending)))
    for number, variant in enumerate(dict.fromkeys(name for one in subjects for name in one.variants("corruption"))):
        records = ((one, one.variants("corruption").get(variant)) for one in subjects)
        corrupted = [(one, record["details"]) for one, record in records if record]
        for classifier in dict.fromkeys(name for _, details in corrupted for name in details["accuracy"]):
            name = f"corruption-{classifier}" + (f"-{number + 1}" if number else "")
            heading = f"{classifier}: mean top-1 (%) by severity of corruption" + (f", {variant}" if variant else "")
            found.append(picture(name, heading, partial(_draw_corruption, corrupted=corrupted, classifier=classifier)))
    calibrated = [(one, record["details"]) for one in subjects if (record := one.record("calibration"))]
    for key, title in (("reliability", "fixed"), ("reliability_adaptive", "confidence-adaptive")):
        if calibrated:
            name, heading = key.replace("_", "-"), f"reliability of p(r|z) at {title} temperature"
            found.append(picture(name, heading, partial(_draw_reliability, calibrated=calibrated, key=key)))
    return found


def _draw_few_shot(axis: "Axes", few: list[tuple[Subject, dict]], ending: str) -> None:
    from matplotlib.ticker import NullFormatter

    handles = []
    for subject, record in few:
        names = [name for name in record["details"] if name.endswith(ending)]
        names.sort(key=lambda name: record["details"][name]["images"])
        images = [record["details"][name]["images"] for name in names]
        means, halves = (
            [record["metrics"].get(f"{name}{suffix}") or 0.0 for name in names] for suffix in ("", "_ci95")
        )
        handles.append(
            axis.errorbar(images, means, halves, fmt=f"o{subject.line}", color=subject.colour, ms=3, capsize=2)
        )
    axis.set(xscale="log", xlabel="labelled images")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    legend(axis, handles, [subject.group for subject, _ in few])


def _draw_corruption(axis: "Axes", corrupted: list[tuple[Subject, dict]], classifier: str) -> None:
    handles = []
    for subject, details in corrupted:
        mean = np.mean(list(details["accuracy"][classifier].values()), axis=0)
        severities, values = [0, *details["severities"]], [details["clean"][classifier], *mean]
        handles += axis.plot(severities, values, f"o{subject.line}", color=subject.colour, markersize=3)
    axis.set(xlabel="severity (0: clean)", xticks=severities)
    legend(axis, handles, [subject.group for subject, _ in corrupted])


def _draw_reliability(axis: "Axes", calibrated: list[tuple[Subject, dict]], key: str) -> None:
    handles = axis.plot([0, 1], [0, 1], ":", color=INK, linewidth=1)
    for subject, details in calibrated:
        rows = [row for row in details[key] if row["count"]]
        confidence, accuracy = ([row[name] for row in rows] for name in ("confidence", "accuracy"))
        shares = np.array([row["count"] for row in rows]) / sum(row["count"] for row in rows)
        handles += axis.plot(confidence, accuracy, subject.line, color=subject.colour, linewidth=1)
        axis.scatter(confidence, accuracy, 6 + 120 * shares, color=subject.colour, linewidths=0)
    axis.set(xlabel="confidence (dots: share of samples)", ylabel="accuracy", xlim=(0, 1.03), ylim=(0, 1.03))
    legend(axis, handles, ["perfectly calibrated", *(subject.group for subject, _ in calibrated)])


def embeddings(run: Run, number: int) -> list[Picture]:
    """A run's validation embeddings in the plane, one picture for each measured checkpoint and method, and a legend."""
    found, classes = [], ()
    for evaluation in run.evaluations:
        record = evaluation.of("embedding_plot", run.data_digest)
        if record is None:
            continue
        classes = record["details"]["classes"]
        labels = np.array(record["details"]["labels"])
        colours = _class_colours(len(classes))[labels]
        for method, plane in record["details"]["coordinates"].items():
            title = f"{'t-SNE' if method == 'tsne' else method.upper()}, {run.moment(evaluation.step)}"
            name = f"{method}-{number + 1}-step-{evaluation.step}"
            points = np.array(plane)
            found.append(picture(name, title, partial(_scatter, points=points, colours=colours), width=2.4, height=2.4))
    found.sort(key=lambda one: one.name.partition("-")[0] != "tsne")  # stable: steps stay in order
    if 0 < len(classes) <= 20:
        name = f"classes-{number + 1}"
        found.append(picture(name, "classes", partial(_class_legend, classes=classes), width=2.4, height=2.4))
    return found


def _scatter(axis: "Axes", points: np.ndarray, colours: np.ndarray) -> None:
    size = max(1.0, min(9.0, 4000 / len(points)))
    axis.scatter(*points.T, c=colours, s=size, linewidths=0, rasterized=True)
    axis.set_aspect("equal", "datalim")
    axis.axis("off")


def _class_legend(axis: "Axes", classes: Sequence[str]) -> None:
    handles = [axis.plot([], [], "o", color=colour)[0] for colour in _class_colours(len(classes))]
    labels = [name if len(name) <= 18 else f"{name[:17]}…" for name in classes]
    axis.legend(handles, [f" {label}" for label in labels], loc="center", ncols=1 if len(classes) <= 10 else 2)
    axis.axis("off")


def _class_colours(count: int) -> np.ndarray:
    """(count, 4) RGBA."""
    import matplotlib

    if count <= 20:
        return matplotlib.colormaps["tab10" if count <= 10 else "tab20"](np.arange(count))
    return matplotlib.colormaps["hsv"](np.linspace(0, 1, count, endpoint=False))


def stored(run: Run, number: int) -> tuple[list[Picture], list[Picture], list[str]]:
    """The pictures that evaluators left beside a run's newest results: of the trained encoder, of baselines, and which
    are gone."""
    trained, baselines, missing = [], [], []
    for record in run.evaluations[-1].records if run.evaluations else []:
        if not record.get("picture") or record["evaluator"] in REDRAWN:
            continue
        path = run.path / "evaluation" / record["picture"]
        if not path.is_file():
            missing.append(f"the picture {path} is gone")
            continue
        content = path.read_bytes()
        if not is_png(content):
            missing.append(f"the picture {path} is damaged")
            continue
        title, data = label_of(record).replace("_", " "), record.get("data", {})
        title += f", on {Path(data['dir']).name}" if data_of(record) != run.data_digest else ""
        own = record["model"] == TRAINED
        name = f"{path.stem}-{number + 1}".replace("_", "-")
        one = Picture(name, title if own else f"{title}, {record['model']}", content)
        (trained if own else baselines).append(one)
    return trained, baselines, missing


def throughput(runs: Sequence[Run]) -> list[Picture]:
    """Over the time since each run's first line: images a second, times of steps, and the share of waits for data."""
    found = []
    for name, title, key, band, scale, top in (
        ("throughput", "images per second, all ranks", "images_per_second", None, 1, None),
        ("step-times", "milliseconds of a step: median, 90th percentile", "step_ms_p50", "step_ms_p90", 1, None),
        ("data-wait", "waiting for data (% of the time)", "data_wait_share", None, 100, 100),
    ):
        having = [run for run in runs if any(key in line for line in run.series("train"))]
        if having:
            draw = partial(_draw_speed, runs=having, key=key, band=band, scale=scale, top=top)
            found.append(picture(name, title, draw))
    return found


def _draw_speed(axis: "Axes", runs: Sequence[Run], key: str, band: str | None, scale: float, top: float | None) -> None:
    """band: the upper edge of what is shaded above the curve. scale: of values. top: of the axis."""
    handles, edges = [], []
    for run in runs:
        lines = [line for line in run.series("train") if key in line]
        minutes = [(line["time"] - lines[0]["time"]) / 60 for line in lines]
        values, colour = [scale * line[key] for line in lines], run.look.colour
        handles += axis.plot(minutes, values, color=colour, linestyle=run.look.line, linewidth=1)
        if band:
            upper = [scale * line.get(band, line[key]) for line in lines]
            axis.fill_between(minutes, values, upper, color=colour, alpha=0.2, linewidth=0)
            edges += upper
    if band:  # the first line of a start holds all that is set up in its first step, and would flatten the others
        top = 1.2 * float(np.percentile(edges, 90))
    axis.set(xlabel="minutes since the first line", ylim=(0, top))
    legend(axis, handles, [run.look.name for run in runs])
