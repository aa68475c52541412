"""Print one table of what was measured on several runs, draw the curves of each, and say where everything lies."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from varscale.engine.rundir import find_checkpoint, read_metrics, read_results, run_config
from varscale.errors import UserError

COLUMNS = {
    "kNN, k = 20": ("knn", "top1_k20"),
    "kNN, k = 200": ("knn", "top1_k200"),
    "linear": ("linear_cached", "top1"),
}
CURVES = {  # of metrics.jsonl: title -> (kind, names)
    "loss": ("train", ("loss", "kl", "nll")),
    "kNN top-1 (%)": ("knn", ("top1_k20",)),
    "adaptive temperature": ("train", ("tau2",)),
    "spread of the latent means": ("train", ("spread",)),
    "learning rate": ("train", ("lr",)),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    options = parser.parse_args(arguments)
    try:
        print(table(options.runs))
        for run in options.runs:
            _, checkpoint = find_checkpoint(run)
            print(f"\n{run}: checkpoint {checkpoint}, metrics {run / 'metrics.jsonl'}, plot {draw_curves(run)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def table(runs: list[Path]) -> str:
    """Top-1 in percent: of each run, and of the baselines that were measured beside it with the same protocol."""
    rows: dict[str, dict] = {}
    for run in runs:
        config = run_config(run)
        encoder, size = config.encoder.name, f"{config.data.image_size}x{config.data.image_size}"
        labels = {
            "pixels": f"raw pixels, {size}",
            "untrained": f"untrained {encoder}, {size}",
            "trained": f"{config.objective.name} {encoder}, {size}",
        }
        for record in sorted(read_results(run), key=lambda record: list(labels).index(record["model"])):
            rows.setdefault(labels[record["model"]], {})[record["evaluator"]] = record["metrics"]
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{title:>14}" for title in COLUMNS)]
    for label, found in rows.items():
        values = [found.get(evaluator, {}).get(metric) for evaluator, metric in COLUMNS.values()]
        lines.append(f"{label:{width}}" + "".join(f"{'-' if v is None else format(v, '.2f'):>14}" for v in values))
    return "\n".join(["top-1 accuracy in percent on held-out images", "", *lines])


def draw_curves(run: Path) -> Path:
    """Draw what metrics.jsonl recorded, into RUN/plots/training.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(run / "metrics.jsonl")
    present = {
        title: (kind, [n for n in names if any(n in line for line in lines)]) for title, (kind, names) in CURVES.items()
    }
    present = {title: found for title, found in present.items() if found[1]}
    figure, axes = pyplot.subplots(1, len(present), figsize=(4 * len(present), 3), layout="constrained", squeeze=False)
    for axis, (title, (kind, names)) in zip(axes[0], present.items(), strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line["kind"] == kind and name in line]
            axis.plot(*zip(*points, strict=True), label=name, marker="o" if kind == "knn" else None, markersize=3)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend()
    path = run / "plots" / "training.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(main())
