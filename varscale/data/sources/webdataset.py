"""WebDataset's shards: tar archives in which the files of one sample share their name up to its first dot."""

from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from varscale.data.images import FilePart, read
from varscale.data.sources.archives import ArchiveSplit, Member, Members, members_of
from varscale.data.sources.splits import Source, ignored_note, is_image, numbered_classes
from varscale.errors import UserError

CLASSES_FILE = "classes.txt"


def open_webdataset(spec: str, location: str) -> Source:
    """Shards train-*.tar and val-*.tar of KEY.jpg (or .jpeg, .png) and KEY.cls, the label's number.

    classes.txt beside them may name the classes, one a line.
    """
    ignored: Counter[str] = Counter()
    train, val = (_open_split(Path(location), split, ignored) for split in ("train", "val"))
    classes = _class_names(Path(location)) or numbered_classes(train.labels, location)
    for split in (train, val):
        wrong = np.flatnonzero((split.labels < 0) | (split.labels >= len(classes)))
        if len(wrong):
            raise UserError(
                f"{location}: the label of {split.name(wrong[0])} is {split.labels[wrong[0]]}, but there are "
                f"{len(classes)} classes (by {CLASSES_FILE}, or else by the largest label in train)"
            )
    return Source(spec, classes, train, val, notes=ignored_note(ignored))


def _class_names(folder: Path) -> tuple[str, ...]:
    try:
        lines = (folder / CLASSES_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / CLASSES_FILE}: {error}") from None
    return tuple(line.strip() for line in lines if line.strip())


def _open_split(folder: Path, split: str, ignored: Counter[str]) -> ArchiveSplit:
    shards = sorted(folder.glob(f"{split}-*.tar"))
    if not shards:
        raise UserError(f"{folder} has no shards {split}-*.tar (such as {split}-000000.tar)")
    labels = array("q")

    def samples() -> Iterator[tuple[int, Member]]:
        for number, shard in enumerate(shards):
            for image, label in _samples(shard, ignored):
                labels.append(label)
                yield number, image

    members = Members.listed(shards, samples())
    return ArchiveSplit(members, np.array(labels))


def _samples(shard: Path, ignored: Counter[str]) -> Iterator[tuple[Member, int]]:
    for key, group in groupby(members_of(shard), lambda member: _key(member.name)):
        files = list(group)
        labels = [member for member in files if member.name == f"{key}.cls"]
        images = [member for member in files if member not in labels and is_image(member.name, ignored)]
        for kind, found in ((".jpg, .jpeg or .png", images), (".cls", labels)):
            if len(found) != 1:
                raise UserError(f"{shard}: sample {key} has {len(found) or 'no'} {kind} file, but needs one")
        text = read(FilePart(str(shard), labels[0].offset, labels[0].size))
        try:
            yield images[0], int(np.int64(int(text)))
        except (ValueError, OverflowError):
            raise UserError(f"{shard}: {key}.cls holds {text[:20]!r}, but must hold a whole number") from None


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"
