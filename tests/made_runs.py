"""Directories like those of runs, for tests of what is made of them: nothing is trained."""

import base64
import json
from pathlib import Path

from varscale.config import load_config
from varscale.engine.checkpoints import write_checkpoint
from varscale.engine.manifest import write_manifest

STEPS_PER_EPOCH, EPOCHS, BINS = 4, 3, 40
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8Dwn4EIwDiqkL4KAcT9BQH5x9zPAAAAAElFTkSuQmCC"
)


def make_run(folder: Path, recipe: str = "digits-varcon", *overrides: str, metrics: bool = True) -> Path:
    """A run of 12 steps with checkpoints after 8 and 12, and what training would have recorded."""
    config = load_config(
        recipe, [f"output_dir={folder}", f"schedule.epochs={EPOCHS}", "schedule.warmup_epochs=1", *overrides]
    )
    write_manifest(config, {}, "digest", world_size=2, device="cpu")
    for step in (8, 12):
        write_checkpoint(folder, step, {}, {}, keep=2)
    if metrics:
        lines = [_line(recipe, step) for step in range(1, STEPS_PER_EPOCH * EPOCHS + 1)]
        lines.append({"kind": "knn", "step": 12, "time": 112.0, "epoch": 3, "top1_k20": 91.0, "top5_k20": 99.0})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _line(recipe: str, step: int) -> dict:
    line = {"kind": "train", "step": step, "time": 100.0 + step, "epoch": step / STEPS_PER_EPOCH}
    line |= {"loss": 3 / step, "kl": 1 / step, "nll": 2 / step, "lr": 0.1, "gradient_norm": 1.0}
    if "varcon" in recipe:
        counts = [0] * BINS
        counts[step] = 10 * step
        line |= {"tau2": 0.1, "tau2_std": 0.01, "confidence": 0.5, "classes_present": 10, "tau2_histogram": counts}
    else:
        line |= {
            "cosine": 0.5,
            "spread": 0.9,
            "effective_rank": 40.0,
            "logvar_mean": -1.0,
            "logvar_min": -2.0,
            "logvar_max": 0.0,
        }
    line |= {"images_per_second": 100.0 + step, "views_per_second": 200.0 + 2 * step, "data_wait_share": 0.03125}
    line |= {"step_ms_p50": 10.0, "step_ms_p90": 10.0 + step, "step_ms_max": 30.0 + step, "tflops": 0.5}
    return line | {"process_memory_peak_gib": 1.5}


def record(evaluator: str, metrics: dict, model: str = "trained", **more) -> dict:
    """As evaluate.py writes one."""
    data = {"dir": "data/digits", "digest": "digest"}
    units = {name: "%" if name.startswith("top") else "" for name in metrics}
    return {
        "model": model,
        "evaluator": evaluator,
        "metrics": metrics,
        "units": units,
        "settings": {"k": [20]},
        "notes": [],
        "picture": None,
        "details": {},
        "data": data,
    } | more


def measure(run: Path, step: int, *records: dict) -> Path:
    """Write what was measured on a checkpoint, and a picture for each record that names one."""
    path = run / "evaluation" / f"step-{step:08d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"checkpoint": path.stem, "step": step, "results": records}))
    for one in records:
        if one["picture"]:
            picture = path.parent / one["picture"]
            picture.parent.mkdir(exist_ok=True)
            picture.write_bytes(PIXEL)
    return path


def everything(step: int, shift: float = 0.0) -> list[dict]:
    """Records of all evaluators whose details the report draws, and of one that it does not know."""
    top1 = 90.0 + shift
    bins = [
        {"low": 0.0, "high": 0.5, "count": 0, "accuracy": None, "confidence": None},
        {"low": 0.5, "high": 1.0, "count": 30, "accuracy": 0.8, "confidence": 0.7},
    ]
    plane = [[0.1 * i, (-1) ** i * 0.5] for i in range(12)]
    few = {"top1_1pct": {"images": 10, "top1": [50.0, 60.0]}, "top1_5shot": {"images": 50, "top1": [70.0, 72.0]}}
    return [
        record("knn", {"top1_k20": top1, "top5_k20": 99.125}),
        record("linear_cached", {"top1": top1 + 1.03}),
        record(
            "few_shot",
            {"top1_1pct": 55.0, "top1_1pct_ci95": 63.53, "top1_5shot": 71.0, "top1_5shot_ci95": None},
            details=few,
        ),
        record(
            "corruption",
            {"top1_noise": 44.0},
            details={
                "severities": [1, 2],
                "clean": {"knn": 90.0, "linear": 91.0},
                "accuracy": {"knn": {"fog": [70.0, 61.0]}, "linear": {"fog": [71.0, 62.0]}},
            },
        ),
        record("calibration", {"ece": 0.0625}, details={"reliability": bins, "reliability_adaptive": bins}),
        record(
            "embedding_plot",
            {"trustworthiness_tsne": 0.9},
            details={
                "coordinates": {"tsne": plane, "pca": plane},
                "labels": [i % 3 for i in range(12)],
                "classes": ["zero", "one", "two"],
            },
        ),
        record(
            "clustering",
            {"kmeans_ari": 0.125 + shift},
            picture=f"step-{step:08d}/clustering.png",
            notes=["a note of the evaluator"],
        ),
        record("one_of_tomorrow", {"top1_x": 12.5}, picture=f"step-{step:08d}/one_of_tomorrow.png"),
    ]
