"""What an experiment measures of its runs: by the programs of this checkout, and only what is not known yet."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from varscale.config import parse_section
from varscale.data.dataset import INFO_FILE, read_dataset_info
from varscale.engine.rundir import find_checkpoint, find_checkpoints, read_manifest, read_results
from varscale.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TRAINED = "trained"
BASELINES = {"untrained": "untrained encoder", "pixels": "raw pixels"}  # of evaluate.py, and their rows
CHOICES = {"k", "percent", "shots", "methods"}  # settings of evaluators that only say which metrics there are

Columns = dict[str, tuple[str, str]]  # title -> evaluator and its metric


@dataclass(frozen=True)
class Measures:
    """What an experiment measures: its columns, settings of their evaluators as `evaluate` takes them, whether of
    every checkpoint that a run has kept, and the label of the runs whose baselines are measured, too."""

    columns: Columns
    settings: list[str]
    of_every_checkpoint: bool = False
    baselines_of: str | None = None


def measure(run: Path, measures: Measures, *, baselines: bool = False) -> None:
    """What the columns tell of a run's checkpoints, unless it is known. Raises UserError where that fails."""
    places = reversed(find_checkpoints(run)) if measures.of_every_checkpoint else [run]
    models = [TRAINED, *(BASELINES if baselines else ())]
    for place in places:
        missing = list(dict.fromkeys(name for model in models for name in not_measured(place, measures, model)))
        if missing:
            options = [text for text in measures.settings if text.partition(".")[0] in missing]
            options += ["--baselines"] if baselines else []
            if code := code_of("-m", "varscale.evaluate", "--checkpoint", str(place), *missing, *options):
                raise UserError(f"{place}: evaluation ended with exit code {code}; the same command goes on")


def not_measured(place: Path, measures: Measures, model: str = TRAINED) -> list[str]:
    """The evaluators of which a column's metric is not known, though others of theirs may be, as with `knn.k=[5]`."""
    found = results(place, measures.settings, model)
    columns = measures.columns.values()
    return list(
        dict.fromkeys(name for name, metric in columns if metric not in found.get(name, {"metrics": {}})["metrics"])
    )


def results(place: Path, settings: list[str], model: str = TRAINED) -> dict[str, dict]:
    """By evaluator, the records of a checkpoint's (a run's newest) encoder, or of a baseline: in float32, with these
    settings and otherwise the default ones, on the data it was trained on; only `transfer` is on what it names."""
    from varscale.evaluation import Settings

    wanted = parse_section(Settings, {}, "settings", settings).model_dump(mode="json")
    try:
        digest = read_manifest(find_checkpoint(place)[0])["data_digest"]
        records = read_results(place)
    except UserError:  # not measured yet
        return {}
    other = wanted["transfer"]["data"]
    digest_of_other = read_dataset_info(Path(other)).digest if other and Path(other, INFO_FILE).is_file() else None
    found = {}
    for record in records:
        name, precision = record["evaluator"], record.get("precision", "float32")
        asked = {key: value for key, value in wanted.get(name, {}).items() if key not in CHOICES}
        is_so = all(record["settings"].get(key, value) == value for key, value in asked.items())
        on_its_data = record["data"]["digest"] == (digest_of_other if name == "transfer" else digest)
        if record["model"] == model and precision == "float32" and is_so and on_its_data:
            found[name] = record
    return found


def code_of(*arguments: str) -> int:
    """Run a program of this checkout in the folder from which relative paths were given; its exit code."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, *arguments], env=os.environ | {"PYTHONPATH": path}).returncode
