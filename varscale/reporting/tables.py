"""The tables of a report: configurations, metrics beside baselines and published numbers, speed and hardware."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from varscale.engine.manifest import flatten
from varscale.intervals import estimate
from varscale.reporting.content import Column, Table
from varscale.reporting.published import PUBLISHED, data_set
from varscale.reporting.runs import TRAINED, Run, data_of, label_of
from varscale.reporting.subjects import Subject

LABEL = "label"
FIRST = ("knn", "linear", "linear_cached")  # of the evaluators
# Evaluators and their metric by published protocol.
OURS = {
    "linear": (("linear", "top1"), ("linear_cached", "top1")),
    "classifier": (("classifier", "top1"),),
    "kNN": (("knn", "top1_k200"),),
}
INTERVAL = "_ci95"  # of a metric: half the width of the interval of the one without it


def shown(value: float | None, unit: str = "%") -> str:
    """A metric as text: percent to two digits, other numbers to four."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.2f}" if unit == "%" else f"{value:.4f}"


def configurations(runs: Sequence[Run]) -> tuple[Table | None, Table]:
    """What differs between the runs' configurations (None for a single run), and what is the same in all."""
    flat = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    same = [key for key in keys if all(key in one and one[key] == flat[0][key] for one in flat)]
    common = Table(
        (Column("key", LABEL), Column("all runs" if len(runs) > 1 else runs[0].name, LABEL)),
        [(key, _plain(flat[0][key])) for key in same],
    )
    if len(runs) == 1:
        return None, common
    head = (Column("key", LABEL), *(Column(run.name, LABEL) for run in runs))
    rows = [(key, *(_plain(one[key]) if key in one else "" for one in flat)) for key in keys if key not in same]
    return Table(head, rows), common


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def metrics(subjects: Sequence[Subject]) -> Table | None:
    """Every metric of every subject."""
    if not subjects:
        return None
    values = [subject.metrics() for subject in subjects]
    own = {subject.data_digest for subject in subjects}
    names = data_names((record for subject in subjects for record in subject.records), own)
    heads = [Column(one.name, "baseline" if one.is_baseline else "run") for one in subjects]
    rows = []
    for key in sorted(dict.fromkeys(key for one in values for key in one), key=lambda key: key[0] not in FIRST):
        evaluator, name, unit, data = key
        if name.endswith(INTERVAL):
            continue
        interval = evaluator, f"{name}{INTERVAL}", unit, data
        cells = [with_interval(shown(one.get(key), unit), shown(one.get(interval), unit)) for one in values]
        rows.append((metric_label(key, names), *cells))
    return Table((Column("metric", LABEL), *heads), rows)


def over_seeds(subjects: Sequence[Subject]) -> Table | None:
    """Every metric of every group of subjects: of several the mean, with half its 95 % interval (Student's t); None
    where no group has several."""
    groups: dict[str, list[Subject]] = {}
    for one in subjects:
        groups.setdefault(one.group, []).append(one)
    if all(len(group) == 1 for group in groups.values()):
        return None
    values = [[one.metrics() for one in group] for group in groups.values()]
    names = data_names((record for one in subjects for record in one.records), {one.data_digest for one in subjects})
    keys = dict.fromkeys(key for group in values for one in group for key in one if not key[1].endswith(INTERVAL))
    rows = [
        (metric_label(key, names), *(_mean_of([one.get(key) for one in group], key[2]) for group in values))
        for key in sorted(keys, key=lambda key: key[0] not in FIRST)
    ]
    heads = [Column(name, "baseline" if group[0].is_baseline else "run") for name, group in groups.items()]
    return Table((Column("metric", LABEL), *heads), rows)


def _mean_of(values: Sequence[float | None], unit: str) -> str:
    """Of those that are numbers."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    return with_interval(*(shown(value, unit) for value in estimate(numbers))) if numbers else ""


def metric_label(key: tuple[str, str, str, str], names: dict[str, str]) -> str:
    """Evaluator, metric, unit and data set, these where there is something to tell."""
    evaluator, name, unit, data = key
    return " ".join([evaluator, name, *([f"({unit})"] if unit else []), *([names[data]] if names[data] else [])])


def published(subjects: Sequence[Subject]) -> Table | None:
    """What others published on the data sets that were trained and measured on, and our accuracy beside it, of the same
    kind of classifier on the row's data set."""
    own = [(one, _data_set(one)) for one in subjects if not one.is_baseline]
    columns = (Column("published elsewhere", LABEL), Column("published top-1 (%)", "published"))
    columns += tuple(Column(f"ours: {one.name}") for one, _ in own)
    rows = [
        (
            f"{one.objective}, {one.encoder}, {one.data}, {one.protocol} ({one.source})",
            shown(one.top1),
            *(_ours(subject, one.protocol) if data == one.data else "" for subject, data in own),
        )
        for one in PUBLISHED
        if one.data in {data for _, data in own}
    ]
    return Table(columns, rows) if rows else None


def with_interval(value: str, half_width: str) -> str:
    """A mean with half the width of its interval, where it has one."""
    return f"{value} ± {half_width}" if half_width else value


def _data_set(subject: Subject) -> str | None:
    """What a run was trained on, by `data_set`; None as long as nothing was measured on it."""
    return next((data_set(one["data"]) for one in subject.records if data_of(one) == subject.data_digest), None)


def _ours(subject: Subject, protocol: str) -> str:
    """What stands beside an accuracy published by a protocol."""
    kind = next((kind for kind in OURS if kind in protocol), "")
    found = ((subject.record(name), metric) for name, metric in OURS.get(kind, ()))
    return next((shown(record["metrics"].get(metric)) for record, metric in found if record), "")


def data_names(records: Iterable[dict], own: set[str]) -> dict[str, str]:
    """A name for each data set that was measured on; empty for the one that all were trained on."""
    places = {data_of(record): Path(record.get("data", {}).get("dir", "")).name for record in records}
    return {digest: "" if own == {digest} else f"on {name} ({digest[:8]})" for digest, name in places.items()}


def over_checkpoints(run: Run) -> Table | None:
    """All metrics of all measured checkpoints of a run, models side by side; None for fewer than two checkpoints."""
    if len(run.evaluations) < 2:
        return None
    columns, found = [Column("metric", LABEL)], []
    records = (record for evaluation in run.evaluations for record in evaluation.records)
    places = data_names(records, {run.data_digest})
    for evaluation in run.evaluations:
        models = dict.fromkeys(record["model"] for record in evaluation.records)
        for model in sorted(models, key=lambda model: model != TRAINED):
            own = [record for record in evaluation.records if record["model"] == model]
            kind = "run" if model == TRAINED else "baseline"
            columns.append(Column(f"step {evaluation.step}" + ("" if model == TRAINED else f", {model}"), kind))
            found.append(Subject("", model != TRAINED, "", own, run.data_digest).metrics())
    rows = [
        (metric_label(key, places), *(shown(one.get(key), key[2]) for one in found))
        for key in dict.fromkeys(key for one in found for key in one)
    ]
    return Table(columns, rows)


def corruptions(subjects: Sequence[Subject]) -> Table | None:
    """Top-1 of each classifier by corruption, the mean over severities; images of each origin in rows of their own."""
    found = [
        {
            (variant, classifier, name): values
            for variant, record in one.variants("corruption").items()
            for classifier, table in record["details"]["accuracy"].items()
            for name, values in table.items()
        }
        for one in subjects
    ]
    columns = (Column("corruption, classifier, images", LABEL), *(Column(one.name) for one in subjects))
    rows = [
        (", ".join(filter(None, reversed(key))), *(_mean(one.get(key)) for one in found))
        for key in dict.fromkeys(key for one in found for key in one)
    ]
    return Table(columns, rows) if rows else None


def _mean(values: Sequence[float] | None) -> str:
    return shown(sum(values) / len(values)) if values else ""


def speed(runs: Sequence[Run]) -> Table:
    """Throughput, hardware and versions, a column for each run; those of its newest start."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        start = run.starts[-1] if run.starts else {}
        hardware, versions = start.get("hardware", {}), start.get("versions", {})
        lines = run.series("train")
        peak = hardware.get("peak")
        entries = {text: _of_lines(lines, key, statistic, form) for text, (key, statistic, form) in SPEED.items()}
        entries |= {
            "peak of a rank's device (TFLOP/s)": f"{peak['tflops']:g}, dense {peak['format']}" if peak else "",
            "first to last line": duration(lines[-1]["time"] - lines[0]["time"]) if lines else "",
            "optimizer steps": str(lines[-1]["step"]) if lines else "",
            "ranks": str(start.get("world_size", "")),
            "images a step": str(run.config["batch"]["global_batch_size"]),
            "device": str(hardware.get("device", "")),
            "processor": str(hardware.get("processor", "")),
            "cores of a rank's machine": str(hardware.get("cores", "")),
            "memory of a rank's machine (GiB)": str(hardware.get("memory_gib", "")),
            "starts": str(len(run.starts)),
            "revision": (start.get("git_revision") or "")[:12],
        }
        entries |= {name: versions.get(name, "") for name in ("python", "torch", "deepspeed", "ffcv")}
        for name, text in entries.items():
            rows.setdefault(name, []).append(text)
    shown_rows = [(name, *cells) for name, cells in rows.items() if any(cells)]
    return Table((Column("", LABEL), *(Column(run.name) for run in runs)), shown_rows)


# Rows of the table of throughput: key of a line of metrics, what is taken of all lines, how it is written.
SPEED = {
    "images/s, median": ("images_per_second", median, "{:.1f}"),
    "images/s, greatest": ("images_per_second", max, "{:.1f}"),
    "views/s, median": ("views_per_second", median, "{:.1f}"),
    "step, median (ms)": ("step_ms_p50", median, "{:.1f}"),
    "step, 90th percentile (ms)": ("step_ms_p90", median, "{:.1f}"),
    "step, longest (ms)": ("step_ms_max", max, "{:.1f}"),
    "waiting for data": ("data_wait_share", median, "{:.1%}"),
    "TFLOP/s of a rank": ("tflops", median, "{:.3g}"),
    "MFU": ("mfu", median, "{:.1%}"),
    "device memory, peak (GiB)": ("device_memory_peak_gib", max, "{:.2f}"),
    "process memory, peak (GiB)": ("process_memory_peak_gib", max, "{:.2f}"),
}


def _of_lines(lines: Sequence[dict], key: str, statistic: Callable[[list[float]], float], form: str) -> str:
    values = [line[key] for line in lines if key in line]
    return form.format(statistic(values)) if values else ""


def duration(seconds: float) -> str:
    """For people: 5 s, 3 min, 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def protocols(run: Run) -> Table | None:
    """The settings of what was measured on a run's newest checkpoint."""
    records = run.evaluations[-1].records if run.evaluations else []
    rows = [
        (label_of(one), one["model"], duration(one.get("seconds", 0)), json.dumps(one["settings"]))
        for one in records
        if one.get("settings")
    ]
    heads = ("evaluator", "model", "time", "settings")
    return Table([Column(head, LABEL) for head in heads], rows) if rows else None


HEADLINES = {
    "kNN, k = 20": ("knn", "top1_k20"),
    "kNN, k = 200": ("knn", "top1_k200"),
    "linear": ("linear", "top1"),
    "linear, cached": ("linear_cached", "top1"),
}


def headlines(subjects: Sequence[Subject]) -> str:
    """Top-1 of those who were measured, as text for a terminal: the baselines first, as a ladder to climb."""
    values = {
        title: [(one.record(evaluator) or {"metrics": {}})["metrics"].get(metric) for one in subjects]
        for title, (evaluator, metric) in HEADLINES.items()
    }
    values = {title: column for title, column in values.items() if any(value is not None for value in column)}
    if not values:
        return "no accuracy was measured yet"
    width = max(len(one.name) for one in subjects)
    lines = [" " * width + "".join(f"{title:>16}" for title in values)]
    for row in sorted(range(len(subjects)), key=lambda row: not subjects[row].is_baseline):
        numbers = "".join(f"{shown(column[row]) or '-':>16}" for column in values.values())
        lines.append(f"{subjects[row].name:{width}}{numbers}")
    whose = "" if len({one.data_digest for one in subjects}) == 1 else "different "
    return "\n".join([f"top-1 accuracy in percent on {whose}held-out images", "", *lines])
