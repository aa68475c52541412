"""What was measured on one checkpoint: a JSON file that grows with every result, and a table to read."""

import json
from importlib.metadata import version
from pathlib import Path

from varscale.data.dataset import DatasetInfo
from varscale.errors import UserError
from varscale.evaluation.context import Result

PACKAGES = ("varscale", "torch", "torchvision", "accelerate", "numpy")


class Report:
    """The results of one checkpoint on one data set.

    `path`: the JSON file, written anew with every result: {"checkpoint", "step", "results": [record, ...]}, where a
    record tells the model, the evaluator, its metrics in percent, its settings, the data and the versions of packages.
    """

    def __init__(self, path: Path, step: int, directory: Path, info: DatasetInfo):
        self.path, self.step, self.directory, self.info = path, step, directory, info
        self.measured: list[dict] = []
        self.notes: list[str] = []

    def add(self, model: str, evaluator: str, result: Result, surroundings: dict) -> None:
        """Record one result, in place of an older one of the same model and evaluator on the same data."""
        info = self.info
        record = {
            "model": model,
            "evaluator": evaluator,
            "metrics": result.metrics,
            "settings": result.settings,
            "notes": list(result.notes),
            **surroundings,
            "data": {
                "dir": str(self.directory),
                "digest": info.digest,
                "classes": info.num_classes,
                "train": info.num_samples("train"),
                "val": info.num_samples("val"),
            },
            "versions": {name: version(name) for name in PACKAGES},
        }
        self.measured.append(record)
        self.notes += [f"{model}, {evaluator}: {note}" for note in result.notes]
        self._write(record)

    def table(self) -> str:
        """What was measured just now, one row a metric and one column a model, in percent."""
        info, models = self.info, list(dict.fromkeys(record["model"] for record in self.measured))
        rows: dict[tuple[str, str], dict[str, float]] = {}
        for record in self.measured:
            for metric, value in record["metrics"].items():
                rows.setdefault((record["evaluator"], metric), {})[record["model"]] = value
        widths = [max(len(key[i]) for key in rows) for i in (0, 1)]
        lines = [
            f"{self.path.parents[1]}, step {self.step}, on {self.directory}: {info.num_samples('val')} validation and "
            f"{info.num_samples('train')} training images of {info.num_classes} classes; accuracy in percent",
            "",
            f"{'':{sum(widths) + 2}}" + "".join(f"{model:>12}" for model in models),
        ]
        for (evaluator, metric), values in rows.items():
            numbers = "".join(f"{values[model]:12.2f}" for model in models)
            lines.append(f"{evaluator:{widths[0]}}  {metric:{widths[1]}}{numbers}")
        return "\n".join([*lines, "", *self.notes, f"written to {self.path}"])

    def _write(self, record: dict) -> None:
        content = {"checkpoint": self.path.stem, "step": self.step}
        try:
            older = json.loads(self.path.read_text())["results"] if self.path.exists() else []
            content["results"] = [one for one in older if _subject(one) != _subject(record)] + [record]
            self.path.parent.mkdir(exist_ok=True)
            aside = self.path.with_suffix(".json.tmp")
            aside.write_text(json.dumps(content, indent=1) + "\n")
            aside.replace(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path}: not a file of results; move it away and measure again") from None


def _subject(record: dict) -> tuple[str, str, str]:
    """What a record is about: a newer one about the same takes its place."""
    return record["model"], record["evaluator"], record["data"]["digest"]
