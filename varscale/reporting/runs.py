"""What the directories of runs hold, read without torch; what is missing or damaged is noted, not refused."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from varscale.engine.rundir import (
    STEP,
    check_exists,
    checkpoint_name,
    evaluation_files,
    latest_checkpoint,
    read_evaluation,
    read_manifest,
    read_sound_metrics,
)
from varscale.errors import UserError
from varscale.reporting.plotting import COLOURS, LINES
from varscale.reporting.step_profile import read_step_profile

TRAINED, UNTRAINED, PIXELS = "trained", "untrained", "pixels"  # of evaluate.py


class Evaluation(NamedTuple):
    """What was measured on one checkpoint."""

    step: int
    records: list[dict]

    def of(self, evaluator: str, data: str) -> dict | None:
        """The newest record of an evaluator about the trained encoder on the data of this digest."""
        wanted = evaluator, TRAINED, data
        found = [one for one in self.records if (one["evaluator"], one["model"], data_of(one)) == wanted]
        return found[-1] if found else None


def data_of(record: dict) -> str:
    """The digest of the data that a record is about."""
    return record.get("data", {}).get("digest", "")


def label_of(record: dict) -> str:
    """The evaluator of a record, with its variant where it has one."""
    return f"{record['evaluator']} ({record['variant']})" if record.get("variant") else record["evaluator"]


class Look(NamedTuple):
    """What runs that differ in nothing but their seed are called together, and how they are drawn."""

    name: str
    colour: str
    line: str


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: the end of its path that tells it from the others. look: shared with its repetitions on other seeds.
        config, starts, data_digest: of its manifest. lines: of metrics.jsonl.
        evaluations: the oldest checkpoint's first.
        profile: where the time of its steps goes, as `trace.analyse` found it, if it was profiled.
        missing: what a reader would look for in vain.
    """

    path: Path
    name: str
    config: dict
    starts: list[dict]
    data_digest: str
    lines: list[dict]
    evaluations: list[Evaluation]
    profile: dict | None
    missing: list[str]
    look: Look

    @property
    def objective(self) -> str:
        return self.config["objective"]["name"]

    @property
    def encoder(self) -> str:
        return self.config["encoder"]["name"]

    def series(self, kind: str) -> list[dict]:
        """The lines of metrics.jsonl of this kind."""
        return [line for line in self.lines if line["kind"] == kind]

    def moment(self, step: int) -> str:
        """A step for people, with its epoch where epochs were recorded."""
        last = next((line for line in reversed(self.series("train")) if line.get("epoch")), None)
        return f"epoch {round(step * last['epoch'] / last['step'], 2):g}, step {step}" if last else f"step {step}"


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs, each once. Raises UserError for one that is not there or has no sound manifest."""
    paths = list({path.resolve(): path for path in paths}.values())
    for path in paths:
        check_exists(path)
    return _with_looks([_read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)])


def _read_run(path: Path, name: str) -> Run:
    manifest = read_manifest(path)
    config, starts, digest = manifest["config"], manifest["starts"], manifest["data_digest"]
    try:
        _ = config["objective"]["name"], config["encoder"]["name"], config["data"]["dir"], config["schedule"]["epochs"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / 'manifest.json'}: not a manifest of a run (no {error})") from None
    lines, damaged = read_sound_metrics(path / "metrics.jsonl")
    missing = []
    if not lines:
        missing.append("no metrics were recorded (metrics.jsonl): there are no curves")
    if damaged:
        some = ", ".join(map(str, damaged[:5])) + (" ..." if len(damaged) > 5 else "")
        missing.append(f"metrics.jsonl: {len(damaged)} damaged line(s) were left out (number {some})")
    missing += _not_done(path, lines, config["schedule"]["epochs"])
    if lines and config["objective"]["name"] == "varcon" and not any("tau2_histogram" in line for line in lines):
        missing.append("the distribution of tau2 was not recorded: it was trained by an older version")
    evaluations = []
    for file in evaluation_files(path):
        try:
            content = read_evaluation(file)
            evaluations.append(Evaluation(int(file.stem.removeprefix(STEP)), content["results"]))
        except UserError as error:
            missing.append(str(error))
    missing += _not_measured(path, evaluations)
    try:
        profile = read_step_profile(path)
    except ValueError as error:
        profile = None
        missing.append(str(error))
    look = Look(name, COLOURS[0], LINES[0])
    return Run(path, name, config, starts, digest, lines, evaluations, profile, missing, look)


def _with_looks(runs: list[Run]) -> list[Run]:
    """A colour for each configuration, whatever its seeds, and another line where there are more than colours."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        rest = {key: value for key, value in run.config.items() if key not in ("seed", "output_dir")}
        alike.setdefault(json.dumps(rest), []).append(run)
    groups: list[list[Run]] = []
    for group in alike.values():
        repeated = len({run.config["seed"] for run in group}) == len(group)
        groups += [group] if repeated else [[run] for run in group]
    looks = {}
    for number, group in enumerate(groups):
        line = LINES[number // len(COLOURS) % len(LINES)]
        look = Look(_common_name([run.name for run in group]), COLOURS[number % len(COLOURS)], line)
        looks |= {run.name: look for run in group}
    return [replace(run, look=looks[run.name]) for run in runs]


def _common_name(names: list[str]) -> str:
    """Of runs on several seeds what stands before these, as far as it is the same."""
    if len(names) == 1:
        return names[0]
    same = len(list(takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))))
    start = re.sub(r"[-_ /]?(seed)?[-_ ]?$", "", names[0][:same])
    return f"{start or names[0]} ({len(names)} seeds)"


def _not_done(path: Path, lines: list[dict], epochs: int) -> list[str]:
    """What is left of the training, and what went wrong in it."""
    reached = next((line["epoch"] for line in reversed(lines) if line["kind"] == "train" and "epoch" in line), epochs)
    told = [f"it is at epoch {reached:.4g} of {epochs}"] if reached < epochs - 1e-6 else []
    bad = [file.name for file in sorted(path.glob("bad-step-*.json"))]
    return told + ([f"it had {len(bad)} bad step(s), told in {', '.join(bad[:3])}"] if bad else [])


def _not_measured(path: Path, evaluations: list[Evaluation]) -> list[str]:
    newest = latest_checkpoint(path)
    command = f"python -m varscale.evaluate --checkpoint {path} knn linear_cached --baselines"
    if not evaluations:
        return [f"nothing was measured on it yet: {command}"]
    if newest and newest.name != checkpoint_name(evaluations[-1].step):
        return [f"measured at step {evaluations[-1].step}, not yet at its newest checkpoint, {newest.name}: {command}"]
    return []


def _names(paths: list[Path]) -> list[str]:
    """Of each path as much of its end as tells it from the others."""
    parts = [path.resolve().parts for path in paths]
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]
