"""What a run checks before torch is loaded: its data, its output directory; and how a user's mistake is reported."""

import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from varscale.config import BatchSizes, Config
from varscale.data.dataset import BetonSummary, DatasetInfo, check_beton, check_counts, read_dataset_info
from varscale.data.decoders import check_decoder
from varscale.data.memory import check_cached
from varscale.engine.manifest import refuse_another_run
from varscale.engine.rundir import SUBMISSIONS, find_checkpoint, find_checkpoints, read_manifest
from varscale.errors import UserError
from varscale.files import is_unfinished

EXIT_USER_ERROR, EXIT_BAD_STEP = 2, 3  # for others see stopping.py
WAIT_FOR_RANK_0 = 5.0  # seconds; launchers end all ranks soon after the first one ended


def environment_rank() -> int:
    """This process's rank as its launcher (deepspeed, torchrun, srun) set it; 0 where none did."""
    return int(os.environ.get("RANK", "0"))


def environment_world_size() -> int:
    """The number of ranks as the launcher set it; 1 where none did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def report_user_error(error: Exception) -> int:
    """Print a mistake in the input in one line and return exit code 2.

    Rank 0 speaks for all, if the others made the same one.
    """
    if environment_rank() > 0:
        time.sleep(WAIT_FOR_RANK_0)
    print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


@dataclass(frozen=True)
class TrainingData:
    """The converted data set of a run, found complete."""

    info: DatasetInfo
    train: BetonSummary
    val: BetonSummary

    @property
    def labelled(self) -> bool:
        """Whether both splits have labels."""
        return self.train.labels is not None and self.val.labels is not None


def check_training_data(config: Config, sizes: BatchSizes) -> TrainingData:
    """Read the data set's description and the metadata of both files; UserError where they do not fit the run."""
    check_decoder(config.data.loader)
    info = read_dataset_info(config.data.dir)
    found = {}
    for split in ("train", "val"):
        path = config.data.dir / f"{split}.beton"
        found[split] = check_beton(path, num_classes=info.num_classes, require_labels=config.objective.needs_labels)
        check_counts(path, found[split], info, split)
        if config.data.os_cache:
            check_cached(path)
    if found["train"].num_samples < sizes.global_batch_size:
        raise UserError(
            f"batch.global_batch_size is {sizes.global_batch_size}, but {config.data.dir / 'train.beton'} "
            f"holds only {found['train'].num_samples} images: not one step could be taken"
        )
    return TrainingData(info, found["train"], found["val"])


@dataclass(frozen=True)
class Job:
    """What is to be run, and found possible: the configuration, what follows from it, and the data.

    profile: whether to record where the time of some steps goes.
    """

    config: Config
    sizes: BatchSizes
    deepspeed: dict
    data: TrainingData
    profile: bool = False


@dataclass(frozen=True)
class Origin:
    """Where a run may go on from: checkpoints, the one to be preferred first; none for a new run.

    fall_back: whether a damaged one may be passed over for the next.
    """

    checkpoints: Sequence[Path] = ()
    fall_back: bool = True


def check_run_directory(config: Config, data_digest: str, resume: str | None) -> Origin:
    """What there is to go on from; writes nothing.

    Raises UserError when output_dir holds something that would be overwritten, and when the checkpoint belongs to a run
    of another architecture, configuration or data set.
    """
    run = config.output_dir
    for tracker in set(config.logging.trackers) - {"tensorboard"}:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"logging.trackers: {tracker} is not installed (pip install {tracker})")
    if resume not in (None, "auto"):
        origin, checkpoint = find_checkpoint(Path(resume))
        refuse_another_run(read_manifest(origin), config, data_digest, checkpoint)
        if run.resolve() != origin.resolve() and not _is_free(run):
            raise UserError(
                f"output_dir: {run} already holds something; go on from {resume} in a new directory, "
                f"or with output_dir={origin}"
            )
        if Path(resume).resolve() == origin.resolve():
            return Origin(find_checkpoints(origin))
        return Origin([checkpoint], fall_back=False)
    if _is_free(run):
        return Origin()
    if not (run / "manifest.json").is_file():
        raise UserError(f"output_dir: {run} holds files that are not a run's; choose an empty or new directory")
    checkpoints = find_checkpoints(run)
    if resume is None:
        raise UserError(f"output_dir: {run} already holds a run; continue it with --resume auto, or choose another")
    try:
        refuse_another_run(read_manifest(run), config, data_digest, run)
    except UserError as error:
        hint = "" if checkpoints else "; it has no checkpoint: if it is not running, delete it"
        raise UserError(f"{error}{hint}") from None
    return Origin(checkpoints)


def _is_free(run: Path) -> bool:
    """Whether a run may begin here: there is nothing, or what prepares a run. Raises UserError where it cannot be."""
    place = next(folder for folder in (run, *run.absolute().parents) if os.path.exists(folder))  # exists() may raise
    if not place.is_dir():
        raise UserError(f"output_dir: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
        raise UserError(f"output_dir: {run} cannot be written (no permission in {place})")
    return not run.exists() or all(is_unfinished(path) or path.name == SUBMISSIONS for path in run.iterdir())
