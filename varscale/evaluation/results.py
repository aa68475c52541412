"""What was measured on one checkpoint: a JSON file that grows with every result, and a table to read."""

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from varscale.data.dataset import DatasetInfo
from varscale.errors import UserError
from varscale.evaluation.context import PERCENT, Result
from varscale.files import alone_in, replace_text
from varscale.versions import versions_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("varscale", "torch", "torchvision", "accelerate", "numpy")


class Report:
    """The results of one checkpoint on one data set.

    `path`: the JSON file, written anew with every result: {"checkpoint", "step", "results": [record, ...]}, a record a
    line. It tells the model, the evaluator, its metrics, their units ("%", or "" for plain numbers), its settings,
    details and picture (a file beside `path`, or null), the data that it was measured on, its variant (see `Result`)
    and the versions of packages. null is a number that is not finite. `other_data`: these are not the data that the run
    was trained on.
    """

    def __init__(self, path: Path, step: int, directory: Path, info: DatasetInfo, *, other_data: bool = False):
        self.path, self.step, self.directory, self.info = path, step, directory, info
        self.suffix = [info.digest[:8]] if other_data else []  # of the pictures' names
        self.measured: list[dict] = []
        self.notes: list[str] = []

    def add(
        self, model: str, evaluator: str, result: Result, surroundings: dict, figure: "Figure | None" = None
    ) -> None:
        """Record one result, in place of an older one of the same model, evaluator and variant on the same data."""
        directory, info = result.data or (self.directory, self.info)
        record = {
            "model": model,
            "evaluator": evaluator,
            "variant": result.variant,
            "metrics": result.metrics,
            "units": {name: result.units.get(name, PERCENT) for name in result.metrics},
            "settings": result.settings,
            "notes": list(result.notes),
            "picture": self._draw(figure, model, evaluator, result.variant) if figure else None,
            "details": result.details,
            **surroundings,
            "data": {
                "dir": str(directory),
                "digest": info.digest,
                "source": info.source,
                "classes": info.num_classes,
                "train": info.num_samples("train"),
                "val": info.num_samples("val"),
            },
            "versions": versions_of(PACKAGES),
        }
        record = _finite(record)
        self.measured.append(record)
        self.notes += [f"{model}, {evaluator}: {note}" for note in result.notes]
        self._write(record)

    def table(self) -> str:
        """What was measured just now, one row a metric and one column a model."""
        info, models = self.info, list(dict.fromkeys(record["model"] for record in self.measured))
        rows: dict[tuple[str, str, str], dict[str, float]] = {}
        for record in self.measured:
            for metric, value in record["metrics"].items():
                row = self._label(record), metric, record["units"][metric]
                rows.setdefault(row, {})[record["model"]] = value
        widths = [max(len(key[i]) for key in rows) for i in (0, 1)]
        lines = [
            f"{self.path.parents[1]}, step {self.step}, on {self.directory}: {info.num_samples('val')} validation and "
            f"{info.num_samples('train')} training images of {info.num_classes} classes",
            "",
            f"{'':{sum(widths) + 5}}" + "".join(f"{model:>12}" for model in models),
        ]
        for (label, metric, unit), values in rows.items():
            numbers = "".join(f"{_shown(values.get(model), unit):>12}" for model in models)
            lines.append(f"{label:{widths[0]}}  {metric:{widths[1]}}  {unit or '-'}{numbers}")
        return "\n".join([*lines, "", *self.notes, f"written to {self.path}"])

    def _label(self, record: dict) -> str:
        """The evaluator with its variant and, where that is not the data set of the others, what it was measured on."""
        data, variant = record["data"], f" ({record['variant']})" if record["variant"] else ""
        other = f" on {Path(data['dir']).name}" if data["digest"] != self.info.digest else ""
        return f"{record['evaluator']}{variant}{other}"

    def _draw(self, figure: "Figure", model: str, evaluator: str, variant: str) -> str:
        """Save a picture; returns its path beside the JSON file."""
        folder = self.path.with_suffix("")
        own = [re.sub(r"[^\w.]+", "_", variant)] if variant else []
        name = "-".join([evaluator, *own, *([model] if model != "trained" else []), *self.suffix])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            aside = folder / f".{name}.png"
            figure.savefig(aside, dpi=120)
            aside.replace(folder / f"{name}.png")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
        return f"{folder.name}/{name}.png"

    def _write(self, record: dict) -> None:
        content = {"checkpoint": self.path.stem, "step": self.step}
        try:
            self.path.parent.mkdir(exist_ok=True)
            with alone_in(self.path.parent):  # another evaluation may add to it
                older = json.loads(self.path.read_text())["results"] if self.path.exists() else []
                content["results"] = [one for one in older if _subject(one) != _subject(record)] + [record]
                replace_text(self.path, _one_record_a_line(content))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path}: not a file of results; move it away and measure again") from None


def _one_record_a_line(content: dict) -> str:
    """JSON in which details of thousands of numbers do not take a line each."""
    head = json.dumps({key: value for key, value in content.items() if key != "results"})
    records = ",\n".join(json.dumps(record, allow_nan=False) for record in content["results"])
    return f'{head[:-1]}, "results": [\n{records}\n]}}\n'


def _finite(value: object) -> object:
    """The same with None for numbers that are not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if unit == PERCENT else f"{value:.4f}"


def _subject(record: dict) -> tuple[str, str, str, str]:
    """What a record is about: a newer one about the same takes its place."""
    return record["model"], record["evaluator"], record.get("variant", ""), record["data"]["digest"]
