"""A folder that appears complete or not at all: made beside its place, forced to the disk, renamed into it.

What is made beside it survives an interruption once a journal tells how far it is.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from varscale.errors import UserError
from varscale.files import sync

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


class Stage(NamedTuple):
    """The folder beside a target in which it is made.

    `result` becomes the target. Beside it lie the lock of the conversion at work, the data set that is being replaced,
    and `journal` with the files that it tells of, by which another conversion goes on.
    """

    folder: Path

    @property
    def result(self) -> Path:
        return self.folder / "result"

    @property
    def replaced(self) -> Path:
        return self.folder / "replaced"

    @property
    def journal(self) -> Path:
        return self.folder / "journal.json"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    def clear(self) -> None:
        """Drops what an earlier conversion left."""
        self.journal.unlink(missing_ok=True)
        shutil.rmtree(self.result, ignore_errors=True)
        self.result.mkdir()


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
) -> Iterator[Stage]:
    """Yields a stage beside `target`, whose result takes the target's place when the block ends.

    When the block fails, the stage stays if it holds a journal, and vanishes otherwise. The next call for the same
    target yields the same stage, with what is in it.

    Args:
        target: the folder to make; missing parents are made, and removed again if the stage vanishes.
        required: files that every earlier result has; a folder that lacks one of them is somebody else's.
        optional: further files that an earlier result may have.
        overwrite: replace an earlier result. Anything else is never replaced.

    Raises:
        UserError: the target exists and must stay; another process makes it; no permission; disk full; any other error
            of the file system.
    """
    check = {"required": required, "optional": optional, "overwrite": overwrite}
    check_target(target, **check)
    real = target.resolve()
    stage = Stage(real.parent / f".{real.name}.partial")
    new_parents = [parent for parent in real.parents if not parent.exists()]
    try:
        try:
            stage.folder.mkdir(parents=True, exist_ok=True)
            with _locked(stage, target):
                if stage.replaced.exists() and not real.exists():  # killed while publishing
                    stage.replaced.rename(real)
                check_target(target, **check)  # again, for what happened before the lock
                stage.result.mkdir(exist_ok=True)
                yield stage
                _publish(stage, real)
        except OSError as error:
            raise UserError(_explain(target, real.parent, error)) from None
    except BaseException:
        for parent in new_parents:
            with suppress(OSError):  # the stage is there, or somebody else began to use it
                parent.rmdir()
        raise


@contextmanager
def _locked(stage: Stage, target: Path) -> Iterator[None]:
    """Holds the stage for this process; removes it at the end unless its journal is to stay."""
    busy = UserError(f"another conversion is writing {target}: wait for its end, or name another folder")
    try:
        lock = open(stage.lock, "w")  # noqa: SIM115  closed below
    except FileNotFoundError:  # its owner ended just now
        raise busy from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:  # a file system without locks, such as some mounts of Lustre
            pass
        if not stage.lock.exists() or not os.path.samestat(os.fstat(lock.fileno()), stage.lock.stat()):
            raise busy
        try:
            yield
        finally:
            if not stage.journal.exists():
                shutil.rmtree(stage.folder, ignore_errors=True)


def _publish(stage: Stage, target: Path) -> None:
    for path in [*stage.result.iterdir(), stage.result]:
        sync(path)
    shutil.rmtree(stage.replaced, ignore_errors=True)
    if target.exists():
        target.rename(stage.replaced)
    try:
        stage.result.rename(target)
    except BaseException:
        if stage.replaced.exists():
            stage.replaced.rename(target)
        raise
    sync(target.parent)
    stage.journal.unlink()


def _explain(target: Path, parent: Path, error: OSError) -> str:
    if error.errno in DISK_FULL:
        free = f"{shutil.disk_usage(parent).free / 1e9:.2f} GB free" if parent.exists() else "not there"
        return f"{target}: the disk is full ({error.strerror}; {parent} now has {free}): make room and start again"
    if error.errno in NO_PERMISSION:
        return f"{target}: no permission to write ({error.strerror}: {error.filename or parent})"
    return f"{target} cannot be written: {error.strerror or error}"
