"""Where a run keeps its things, and how they are found again.

RUN/manifest.json             what ran: resolved configuration, versions, revision, data digest, hardware
RUN/config.yaml               the resolved configuration, usable as a recipe
RUN/metrics.jsonl             one JSON object a line: `{"kind": "train" | "knn" | ..., "step": ..., ...}`
RUN/checkpoints/latest        the name of the newest complete checkpoint
RUN/checkpoints/step-00000042 state.json and safetensors (see checkpoints.py)
RUN/evaluation/               what evaluate.py measured, one JSON a checkpoint
RUN/tensorboard/, RUN/plots/
"""

import difflib
import json
from pathlib import Path

from varscale.config import Config, parse_config
from varscale.errors import UserError


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint made after `step` optimizer steps."""
    return f"step-{step:08d}"


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None while there is none."""
    pointer = run / "checkpoints" / "latest"
    if not pointer.is_file():
        return None
    return pointer.parent / pointer.read_text().strip()


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """Take a run or one checkpoint in it; return (run, checkpoint). Raises UserError where there is none."""
    if (path / "state.json").is_file():
        return path.resolve().parents[1], path
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        nearest = difflib.get_close_matches(path.name, siblings, 1)
        raise UserError(f"{path}: there is no such run" + (f"; nearest: {path.parent / nearest[0]}" if nearest else ""))
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path}: holds no checkpoint (expected {path / 'checkpoints' / 'latest'})")
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
