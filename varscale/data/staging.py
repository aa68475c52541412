"""A folder that appears complete or not at all: written aside, forced to the disk, renamed into place."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from varscale.errors import UserError
from varscale.files import sync

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def check_target(target: Path, *, required: Sequence[str], optional: Sequence[str] = (), overwrite: bool) -> None:
    """Raises UserError unless a result may be put at `target`: see `staged_directory` for the arguments."""
    try:
        real = target.resolve()
        if not real.exists():
            _check_parent(target, next(parent for parent in real.parents if parent.exists()))
            return
        if not real.is_dir():
            raise UserError(f"{target} is a file, but must be the folder to make")
        if real.is_mount():
            raise UserError(f"{target} is a mount point, which cannot be replaced as a whole: name a folder inside it")
        present = {entry.name for entry in real.iterdir()}
    except OSError as error:
        raise UserError(f"cannot read the folder {target}: {error.strerror}") from None
    _check_parent(target, real.parent)
    foreign = present.difference(required, optional) if present.issuperset(required) else present
    if foreign:
        some = ", ".join(sorted(foreign)[:3])
        raise UserError(f"{target} exists and holds other files ({some}): name a new or an empty folder")
    if present and not overwrite:
        raise UserError(f"{target} already holds a data set: pass --overwrite to replace it, or name another folder")


def _check_parent(target: Path, parent: Path) -> None:
    if not parent.is_dir():
        raise UserError(f"{target} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        raise UserError(f"{target}: no permission to write in {parent}")


@contextmanager
def staged_directory(
    target: Path, *, required: Sequence[str], optional: Sequence[str] = (), overwrite: bool = False
) -> Iterator[Path]:
    """Yields an empty folder beside `target` that takes its place when the block ends, and vanishes when it fails.

    Args:
        target: the folder to make; missing parents are made, and removed again on failure.
        required: files that every earlier result has; a folder that lacks one of them is somebody else's.
        optional: further files that an earlier result may have.
        overwrite: replace an earlier result. Anything else is never replaced.

    Raises:
        UserError: the target exists and must stay; no permission; disk full; any other error of the file system.
    """
    check_target(target, required=required, optional=optional, overwrite=overwrite)
    real = target.resolve()
    stage = real.parent / f".{real.name}.{secrets.token_hex(4)}.partial"
    new_parents = [parent for parent in real.parents if not parent.exists()]
    try:
        try:
            real.parent.mkdir(parents=True, exist_ok=True)
            stage.mkdir()
            yield stage
            _publish(stage, real)
        except OSError as error:
            raise UserError(_explain(target, real.parent, error)) from None
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # somebody else began to use it
                parent.rmdir()
        raise


def _publish(stage: Path, target: Path) -> None:
    for path in [*stage.iterdir(), stage]:
        sync(path)
    replaced = stage.with_suffix(".replaced")
    if target.exists():
        os.rename(target, replaced)
    try:
        os.rename(stage, target)
    except BaseException:
        if replaced.exists():
            os.rename(replaced, target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    sync(target.parent)


def _explain(target: Path, parent: Path, error: OSError) -> str:
    if error.errno in DISK_FULL:
        free = f"{shutil.disk_usage(parent).free / 1e9:.2f} GB free" if parent.exists() else "not there"
        return f"{target}: the disk is full ({error.strerror}; {parent} now has {free}); nothing was kept"
    if error.errno in NO_PERMISSION:
        return f"{target}: no permission to write ({error.strerror}: {error.filename or parent})"
    return f"{target} cannot be written: {error.strerror or error}"
