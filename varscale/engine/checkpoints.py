"""Checkpoints: whole tensors in safetensors, written aside and renamed, independent of world size and ZeRO stage.

One folder holds model, optimizer and (for VSSL) teacher tensors, and state.json: the position of the run and a SHA-256
of every file. `latest` names the newest folder and is replaced only after that folder is complete.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from varscale.engine.rundir import checkpoint_name
from varscale.errors import UserError
from varscale.files import replace_text, sync

Tensors = Mapping[str, Tensor]


def write_checkpoint(run: Path, step: int, parts: Mapping[str, Tensors], state: dict, keep: int) -> Path:
    """Write the parts (file stem -> tensors) as the checkpoint of `step`, then delete all but the newest `keep`.

    Only rank 0 calls it. Raises OSError (disk full, no permission) with the older checkpoints untouched.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / checkpoint_name(step)
    aside = folder / f".writing-{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        digests = {f"{stem}.safetensors": _write_tensors(aside / f"{stem}.safetensors", t) for stem, t in parts.items()}
        replace_text(aside / "state.json", json.dumps({"step": step, "state": state, "files": digests}, indent=1))
        if target.exists():  # a resumed run comes by the same step again
            shutil.rmtree(target)
        aside.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{target}: {error}") from error
    replace_text(folder / "latest", target.name)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


def read_state(checkpoint: Path) -> dict:
    """The contents of state.json. Raises UserError when it cannot be read."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / 'state.json'}: cannot be read: {error}") from None


def read_part(checkpoint: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of one part, after comparing the file with its recorded digest; UserError where it is damaged."""
    path = checkpoint / f"{stem}.safetensors"
    expected = read_state(checkpoint)["files"].get(path.name)
    if expected is None or not path.is_file():
        raise UserError(f"{path}: is missing from the checkpoint")
    if _digest(path) != expected:
        raise UserError(f"{path}: is damaged (its SHA-256 is not the one recorded in state.json)")
    return load_file(path)


def _write_tensors(path: Path, tensors: Tensors) -> str:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    sync(path)
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
