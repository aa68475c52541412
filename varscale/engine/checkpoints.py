"""Checkpoints on the disk: folders that are complete or not there, whole tensors in them, a checksum for every file.

A folder is written beside its place, forced to the disk and renamed; then the link `latest` moves to it. It holds
safetensors, state.json (where the run stood) and SHA256SUMS, which `sha256sum --check` understands. Nothing in it
depends on the world size or the ZeRO stage, and nothing is pickled.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from varscale.engine.rundir import BEST, LATEST, REPLACED, STEP, checkpoint_folder, checkpoint_name, find_checkpoints
from varscale.errors import UserError
from varscale.files import let_others_read, make_folder, replace_link, sync

SUMS, STATE = "SHA256SUMS", "state.json"
WRITING, DELETING, DAMAGED = ".writing-", ".deleting-", "damaged-"  # what is put before a folder's name

Tensors = Mapping[str, Tensor]


class NotDeletedError(OSError):
    """A checkpoint was written; what should have gone then could not be deleted."""


def write_checkpoint(run: Path, step: int, parts: Mapping[str, Tensors], state: dict, keep: int) -> Path:
    """Write the parts (file stem -> tensors) as the checkpoint of `step`; keep `keep` and the best.

    Only rank 0 calls it. Raises OSError (disk full, no permission) with the older checkpoints untouched, and
    NotDeletedError where it is written, but the older ones could not be deleted.
    """
    folder = checkpoint_folder(run)
    target = folder / checkpoint_name(step)
    aside = folder / f"{WRITING}{target.name}"
    try:
        make_folder(folder)
        _clear(folder)
        aside.mkdir()
        for stem, tensors in parts.items():
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / f"{stem}.safetensors")
            let_others_read(aside / f"{stem}.safetensors")
        (aside / STATE).write_text(json.dumps({"step": step, "state": state, "parts": sorted(parts)}, indent=1))
        (aside / SUMS).write_text(_lines({path.name: _digest(path) for path in aside.iterdir()}))
        for path in (*aside.iterdir(), aside):
            sync(path)
        if target.exists():  # a resumed run comes by the same step again
            target.rename(folder / f"{target.name}{REPLACED}")
        aside.rename(target)
        sync(folder)
        replace_link(folder / LATEST, target.name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{target}: {error}") from error
    try:
        _delete_old(folder, keep)
    except OSError as error:
        raise NotDeletedError(f"{folder}: old checkpoints cannot be deleted ({error})") from error
    return target


def mark_best(run: Path, step: int) -> None:
    """Make `best` point at the checkpoint of `step`, which from then on is kept until another is better."""
    folder = checkpoint_folder(run)
    if (folder / checkpoint_name(step)).is_dir():
        replace_link(folder / BEST, checkpoint_name(step))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: which file cannot be read or differs from its sum; None where all is well."""
    try:
        found = {path.name for path in checkpoint.glob("*.safetensors")}
        parts = {f"{stem}.safetensors" for stem in read_state(checkpoint)["parts"]}
        for name in sorted(_sums(checkpoint).keys() | found | parts):
            _check(checkpoint / name)
    except (UserError, OSError) as error:  # OSError: no permission, or a disk that fails
        return str(error)
    return None


def put_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for a good one; returns its new place. It alone is kept."""
    aside = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
    for older in checkpoint.parent.glob(f"{DAMAGED}*"):
        shutil.rmtree(older, ignore_errors=True)
    return checkpoint.rename(aside)


def read_state(checkpoint: Path) -> dict:
    """{"step": int, "state": dict, "parts": list[str]}: state.json. Raises UserError if it is damaged or missing."""
    path = checkpoint / STATE
    _check(path)
    return json.loads(path.read_text())


def read_part(checkpoint: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of one part, on the CPU. Raises UserError where the file is damaged or missing."""
    path = checkpoint / f"{stem}.safetensors"
    _check(path)
    return load_file(path)


def _sums(checkpoint: Path) -> dict[str, str]:
    """SHA256SUMS as file name -> digest."""
    path = checkpoint / SUMS
    try:
        text = path.read_bytes().decode()
        found = dict(reversed(line.split("  ")) for line in text.splitlines())
    except (OSError, ValueError) as error:  # ValueError: also what is not UTF-8
        raise UserError(f"{path}: cannot be read: {error}") from None
    if text != _lines(found):
        raise UserError(f"{path}: is damaged (its lines are not as they were written)")
    if STATE not in found:
        raise UserError(f"{path}: does not name {STATE}")
    return found


def _lines(sums: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def _check(path: Path) -> None:
    expected = _sums(path.parent).get(path.name)
    if expected is None or not path.is_file():
        raise UserError(f"{path}: is missing from the checkpoint")
    if _digest(path) != expected:
        raise UserError(f"{path}: is damaged (its SHA-256 is not the one in {SUMS})")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _delete_old(folder: Path, keep: int) -> None:
    kept = {(folder / link).resolve().name for link in (LATEST, BEST)}
    checkpoints = find_checkpoints(folder.parent)
    replaced = [checkpoint for checkpoint in checkpoints if checkpoint.name.endswith(REPLACED)]
    counted = [checkpoint for checkpoint in checkpoints if checkpoint not in replaced]
    for checkpoint in (*replaced, *(old for old in counted[keep:] if old.name not in kept)):
        checkpoint.rename(folder / f"{DELETING}{checkpoint.name}")
    _clear(folder)


def _clear(folder: Path) -> None:
    """Delete what an interrupted write or deletion left."""
    for prefix in (WRITING, DELETING):
        for left in folder.glob(f"{prefix}{STEP}*"):
            shutil.rmtree(left)
