"""Where a run keeps its things, and how they are found again.

RUN/manifest.json             what ran: resolved configuration, versions, revision, data digest, hardware
RUN/config.yaml               the resolved configuration, usable as a recipe
RUN/metrics.jsonl             one JSON object a line: `{"kind": "train" | "knn" | ..., "step": ..., ...}`
RUN/checkpoints/step-00000042 state.json, safetensors and their checksums (see checkpoints.py)
RUN/checkpoints/latest        a link to the newest
RUN/checkpoints/best          a link to that with the best kNN accuracy, where it is measured while training
RUN/evaluation/               what evaluate.py measured, one JSON a checkpoint
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
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        nearest = difflib.get_close_matches(path.name, siblings, 1)
        raise UserError(f"{path}: there is no such run" + (f"; nearest: {path.parent / nearest[0]}" if nearest else ""))
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path}: holds no checkpoint (expected {checkpoint_folder(path) / LATEST})")
    return path, checkpoint


def read_manifest(run: Path) -> dict:
    """The manifest of a run. Raises UserError when it is missing or not JSON."""
    path = run / "manifest.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{run}: is not a run (it has no manifest.json)") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def run_config(run: Path) -> Config:
    """The configuration a run was made with."""
    return parse_config(read_manifest(run)["config"], str(run / "manifest.json"))


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, none if it does not exist; one that a killed run left unfinished is passed over."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
