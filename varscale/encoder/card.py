"""The model card of an encoder: what it was trained on and how, what was measured, how it is used, in Markdown."""

import json
from pathlib import Path

from varscale.config import parse_config, to_yaml
from varscale.data.dataset import DatasetInfo
from varscale.encoder.description import Description
from varscale.engine.rundir import read_evaluation, read_manifest, read_metrics
from varscale.errors import UserError

CLASSES_NAMED = 10
FILL_IN = "**to be filled in**"


def model_card(
    run: Path, checkpoint: Path, description: Description, info: DatasetInfo, *, file: str, code: str
) -> str:
    """The card of the encoder in a checkpoint of a run; reads what the run holds, writes nothing.

    Args:
        info: of the data set that it was trained on.
        file: the name of the exported file that the card goes with.
        code: the lines of Python that load that file without varscale.

    Raises:
        UserError: a file of the run is damaged.
    """
    manifest = read_manifest(run)
    config = parse_config(manifest["config"], str(run / "manifest.json"))
    stem = f" with the {description.stem} stem" if description.stem else ""
    patches = f" with patches of {description.patch_size} pixels" if description.patch_size else ""
    sections = {
        "Use": _use(file, code),
        "Preprocessing": _preprocessing(description),
        "Data": _data(info),
        "Training": _training(manifest, description, config.batch.global_batch_size, info),
        "Metrics": _metrics(run, checkpoint, description.step),
        "Recipe": f"```yaml\n{to_yaml(config).strip()}\n```",
        "Limits": _limits(description),
        "Licence": _licence(info),
    }
    title = (
        f"# {config.name}\n\n`{file}`: a {description.name}{stem}{patches}, trained with the objective "
        f"`{description.objective}`: {description.feature_dim} features of an image, no classifier."
    )
    return "\n\n".join([title, *(f"## {name}\n\n{text}" for name, text in sections.items())]) + "\n"


def _use(file: str, code: str) -> str:
    if file.endswith(".onnx"):
        ours = ""
    else:
        lines = [
            "import varscale",
            "",
            f"encoder = varscale.load_encoder({json.dumps(file)})",
            "features = encoder(encoder.preprocess(images))  # PIL images, uint8 arrays or tensors, or a list of them",
        ]
        ours = "\n".join(["```python", *lines, "```", "", ""])
    return f"{ours}Without varscale, for images prepared as below:\n\n```python\n{code}\n```"


def _preprocessing(description: Description) -> str:
    size, resized = description.image_size, round(description.image_size * 256 / 224)
    return "\n".join(
        [
            f"1. Resize the shorter side to {resized} pixels, or to {size} where it has at most {size} "
            f"({description.interpolation}, antialiased).",
            f"2. Cut out the centre, {size} x {size} pixels.",
            "3. Red, green and blue on the scale from 0 to 1: subtract the mean "
            f"({_numbers(description.mean)}), divide by the standard deviation ({_numbers(description.std)}).",
        ]
    )


def _data(info: DatasetInfo) -> str:
    named = ", ".join(info.classes[:CLASSES_NAMED]) + (", ..." if info.num_classes > CLASSES_NAMED else "")
    rows = {
        "source": f"`{info.source}`",
        "images": f"{info.num_samples('train'):,} for training, {info.num_samples('val'):,} held out",
        "classes": f"{info.num_classes:,}: {named}",
        "digest (SHA-256)": f"`{info.digest}`",
    }
    return _table(("", ""), rows.items())


def _training(manifest: dict, description: Description, batch: int, info: DatasetInfo) -> str:
    starts = manifest["starts"]
    last = starts[-1]
    devices = {f"{start['world_size']} x {start['hardware']['device']}": None for start in starts}
    samples = description.step * batch
    versions = ", ".join(f"{name} {last['versions'][name]}" for name in ("varscale", "torch", "deepspeed"))
    rows = {
        "optimizer steps": f"{description.step:,}",
        "samples seen": f"{samples:,} ({batch:,} a step), {samples / info.num_samples('train'):.1f} times the data",
        "ranks and device": ", then ".join(devices),
        "seed": str(manifest["seed"]),
        "begun": starts[0]["time"],
        "revision of the code": f"`{last['git_revision']}`" if last["git_revision"] else "not recorded",
        "versions": versions,
    }
    return _table(("", ""), rows.items())


def _metrics(run: Path, checkpoint: Path, step: int) -> str:
    """What evaluate.py found for this checkpoint, and the last kNN accuracy that training measured until then."""
    path = run / "evaluation" / f"{checkpoint.name}.json"
    parts = []
    if path.is_file():
        try:
            rows = [row for record in read_evaluation(path)["results"] for row in _rows(record)]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: not a file of results; move it away and measure again") from None
        parts.append("Measured by `python -m varscale.evaluate`; accuracies in percent on the held-out images.")
        parts.append(_table(("model", "evaluator", "metric", "value", "data", "settings"), rows))
    online = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "knn" and line["step"] <= step]
    if online:
        values = [f"{key} {value:.2f}" for key, value in online[-1].items() if key.startswith("top")]
        parts.append(f"While training, after step {online[-1]['step']:,}: kNN {', '.join(values)} percent.")
    return "\n\n".join(parts) or f"None yet; `python -m varscale.evaluate --checkpoint {run} knn linear` measures them."


def _rows(record: dict) -> list[tuple[str, ...]]:
    data = record["data"]
    place = f"{Path(data['dir']).name} `{data['digest'][:12]}`, {data['val']:,} images"
    settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
    numbers = {name: value for name, value in record["metrics"].items() if isinstance(value, int | float)}
    evaluator = f"{record['evaluator']} ({record['variant']})" if record.get("variant") else record["evaluator"]
    return [(record["model"], evaluator, name, f"{value:.4g}", place, settings) for name, value in numbers.items()]


def _limits(description: Description) -> str:
    only = "" if description.stem else f" Images of another size than {description.image_size} pixels are refused."
    return (
        "The features were learned from the data named above and are measured on its held-out images only, unless the "
        "table says otherwise; on pictures of another kind nothing is known of them. They carry what the data carries, "
        f"its biases included.{only}"
    )


def _licence(info: DatasetInfo) -> str:
    return (
        f"Code: Apache-2.0 (varscale).\n\nData (`{info.source}`): {FILL_IN}.\n\n"
        f"These parameters: {FILL_IN}, as the licence of the data allows."
    )


def _table(head: tuple[str, ...], rows: object) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
