"""Where a run keeps its things, and how they are found again.

RUN/manifest.json             what ran: resolved configuration, versions, revision, data digest, hardware
RUN/config.yaml               the resolved configuration, usable as a recipe
RUN/metrics.jsonl             one JSON object a line: `{"kind": "train" | "knn" | ..., "step": ..., ...}`, the rest
                              numbers, but where a name ends in _histogram lists: counts since the line before
RUN/checkpoints/step-00000042 state.json, safetensors and their checksums (see checkpoints.py)
RUN/checkpoints/latest        a link to the newest
RUN/checkpoints/best          a link to that with the best kNN accuracy, where it is measured while training
RUN/evaluation/               what evaluate.py measured: one JSON a checkpoint, beside it a folder of its pictures, and
                              features/, kept under the digest of what made them
RUN/profile/                  of a start with --profile: each rank's trace, and profile.md, .json and .png
RUN/slurm/                    its jobs' logs and the code they run (see varscale/cluster/submission.py)
RUN/tensorboard/, RUN/plots/
"""

import difflib
import json
from pathlib import Path

from varscale.config import Config, parse_config
from varscale.errors import UserError

SUBMISSIONS = "slurm"  # may be there before the run is
LATEST, BEST, STEP = "latest", "best", "step-"
REPLACED = "-replaced"  # behind the name of a checkpoint whose place is being taken by a new one: it still counts


def checkpoint_folder(run: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run / "checkpoints"


def profile_folder(run: Path) -> Path:
    """Where traces of a run's steps lie, and what was made of them."""
    return run / "profile"


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint made after `step` optimizer steps."""
    return f"{STEP}{step:08d}"


def find_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, in the order in which they are to be preferred.

    First that which `latest` names, then those before it from the newest on, then those behind it: a run that went on
    from an older checkpoint has left these.
    """
    folder = checkpoint_folder(run)
    found = sorted((path for path in folder.glob(f"{STEP}*") if path.is_dir()), reverse=True)
    latest = (folder / LATEST).resolve().name
    return sorted(found, key=lambda path: (path.name != latest, path.name.removesuffix(REPLACED) > latest))


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None while there is none."""
    return next(iter(find_checkpoints(run)), None)


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """Take a run or one checkpoint in it; return (run, checkpoint). Raises UserError where there is none."""
    if (path / "state.json").is_file():
        checkpoint = path.resolve()  # it may be named by a link
        return checkpoint.parents[1], checkpoint
    check_exists(path)
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path}: holds no checkpoint (expected {checkpoint_folder(path) / LATEST})")
    return path, checkpoint


def check_exists(run: Path) -> None:
    """Raises UserError, naming the nearest one, where there is no such folder."""
    if not run.is_dir():
        siblings = [p.name for p in run.parent.iterdir()] if run.parent.is_dir() else []
        nearest = difflib.get_close_matches(run.name, siblings, 1)
        raise UserError(f"{run}: there is no such run" + (f"; nearest: {run.parent / nearest[0]}" if nearest else ""))


def read_manifest(run: Path) -> dict:
    """The manifest of a run. Raises UserError when it is missing or damaged."""
    path = run / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{run}: is not a run (it has no manifest.json)") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(manifest, dict) or not manifest.keys() >= {"config", "starts", "data_digest"}:
        raise UserError(f"{path}: not a manifest of a run")
    return manifest


def run_config(run: Path) -> Config:
    """The configuration a run was made with."""
    return parse_config(read_manifest(run)["config"], str(run / "manifest.json"))


def read_metrics(path: Path) -> list[dict]:
    """The sound lines of a metrics.jsonl, none if it does not exist."""
    return read_sound_metrics(path)[0]


def read_sound_metrics(path: Path) -> tuple[list[dict], list[int]]:
    """The lines of a metrics.jsonl, and the numbers of those that are damaged and left out; one that a killed run left
    unfinished is passed over."""
    sound, damaged = [], []
    for number, text in _whole_lines(path):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and {"kind", "step", "time"} <= line.keys():
            sound.append(line)
        else:
            damaged.append(number)
    return sound, damaged


def _whole_lines(path: Path) -> list[tuple[int, bytes]]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [(number, line) for number, line in enumerate(lines, start=1) if line.endswith(b"\n")]


def evaluation_files(run: Path) -> list[Path]:
    """What evaluate.py wrote about the checkpoints of a run, the oldest checkpoint's first."""
    return sorted(path for path in (run / "evaluation").glob(f"{STEP}*.json") if path.stem.removeprefix(STEP).isdigit())


def read_evaluation(path: Path) -> dict:
    """One of them: {"checkpoint", "step", "results": [record, ...]}; for a record see `varscale.evaluation.results`.

    Raises UserError when it is damaged.
    """
    try:
        content = json.loads(path.read_text())
        if all(map(_is_record, content["results"])):
            return content
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path}: not a file of results; move it away and measure again")


def _is_record(record: dict) -> bool:
    tables = isinstance(record["metrics"], dict) and isinstance(record["details"], dict)
    return tables and {"model", "evaluator"} <= record.keys()


def read_results(run: Path) -> list[dict]:
    """What evaluate.py measured on the newest checkpoint of a run. Raises UserError where it was not measured yet."""
    run, checkpoint = find_checkpoint(run)
    path = run / "evaluation" / f"{checkpoint.name}.json"
    if not path.is_file():
        raise UserError(f"{path}: not measured yet; python -m varscale.evaluate --checkpoint {run} --data ... knn")
    return read_evaluation(path)["results"]
