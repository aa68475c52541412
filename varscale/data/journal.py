"""How far a conversion is, kept on the disk so that an interrupted one goes on where it stood."""

import hashlib
import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL

from varscale.data import libffcv
from varscale.data.beton import ENTRY, BetonWriter
from varscale.data.dataset import update_digest
from varscale.data.images import ImageOptions, StoredChunk, StoredImage
from varscale.data.sources import Source
from varscale.data.staging import Stage
from varscale.data.throughput import Throughput
from varscale.files import replace_text

INTERVAL = 5  # seconds between two accounts, the most work that a killed conversion does again; Ctrl-C loses none
VERSION = 1  # of the journal's form


class UnusableWork(Exception):
    """What an earlier conversion left is not to be gone on with; the message says why."""


@dataclass(frozen=True)
class Progress:
    """What a split's conversion has found so far.

    Attributes:
        done: images looked at, in the source's order.
        undecodable: those of them that are left out: the reasons by position in the source.
        mended: positions of damaged JPEGs.
        storage: how many images were stored in which way.
        histogram: (3, 256) int64, of the channels of the images stored.
        digest: of all samples stored up to here, those of earlier splits included.
    """

    done: int = 0
    undecodable: dict[int, str] = field(default_factory=dict)
    mended: tuple[int, ...] = ()
    storage: Counter[str] = field(default_factory=Counter)
    histogram: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), np.int64))
    digest: str = ""

    @property
    def num_samples(self) -> int:
        return self.done - len(self.undecodable)

    def after(self, chunk: StoredChunk, digest: str) -> "Progress":
        """The progress once the next images are stored, too."""
        images = list(enumerate(chunk.images, self.done))
        stored = [(index, image.storage) for index, image in images if isinstance(image, StoredImage)]
        return Progress(
            done=self.done + len(images),
            undecodable=self.undecodable | {index: image for index, image in images if isinstance(image, str)},
            mended=(*self.mended, *(index for index, storage in stored if storage == "mended")),
            storage=self.storage + Counter(storage for _, storage in stored),
            histogram=self.histogram + chunk.histogram,
            digest=digest,
        )

    def to_json(self) -> dict:
        return vars(self) | {"histogram": self.histogram.tolist()}

    @classmethod
    def from_json(cls, content: dict) -> "Progress":
        progress = cls(**content)
        return replace(
            progress,
            undecodable={int(index): reason for index, reason in progress.undecodable.items()},
            mended=tuple(progress.mended),
            storage=Counter(progress.storage),
            histogram=np.array(progress.histogram, np.int64),
        )


def fingerprint(source: Source, options: ImageOptions) -> str:
    """What two conversions must agree on for one to go on with the other's work.

    Files count by their names: to ask a million of them for their times would cost a network's file system minutes.
    """
    versions = {"journal": VERSION, "Pillow": PIL.__version__, "FFCV": libffcv.imdecode() is not None}
    description = [versions, source.spec, source.classes, source.options, asdict(options)]
    digest = hashlib.sha256(json.dumps(description).encode())
    for split in (source.train, source.val):
        for part in split.identity():
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


class Journal:
    """The account of a conversion's work, in its stage.

    journal.json is replaced as a whole, after what it tells of has reached the disk. The .betons' entries so far lie in
    train.entries and val.entries; these and the .betons themselves may be ahead of it, never behind.
    """

    def __init__(self, stage: Stage, fingerprint: str) -> None:
        self.stage, self.fingerprint = stage, fingerprint
        self.progress: dict[str, Progress] = {}
        self._time = time.monotonic()

    @property
    def done(self) -> int:
        """How many images need not be looked at again."""
        return sum(progress.done for progress in self.progress.values())

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._time > INTERVAL

    def write(self, split: str, progress: Progress, writer: BetonWriter) -> None:
        """Puts `progress` on the disk, and before it what `writer` has written."""
        writer.sync()
        kept = self.progress[split].num_samples if split in self.progress else 0
        with open(self._entries_path(split), "r+b" if kept else "wb") as file:
            file.seek(kept * ENTRY.itemsize)
            file.write(writer.entries[kept : progress.num_samples].tobytes())
            file.flush()
            os.fsync(file.fileno())
        parts = self.progress | {split: progress}
        account = {name: part.to_json() for name, part in parts.items()}
        text = json.dumps({"fingerprint": self.fingerprint, "progress": account})
        replace_text(self.stage.journal, f"{_checksum(text)}\n{text}\n")
        self.progress, self._time = parts, time.monotonic()

    def read(self) -> None:
        """Takes up the account that the stage holds, if any.

        Raises:
            UnusableWork: it is damaged, or of another conversion.
        """
        try:
            checksum, text = self.stage.journal.read_text().splitlines()
        except FileNotFoundError:
            return
        except ValueError:
            raise UnusableWork("its journal is damaged") from None
        if _checksum(text) != checksum:
            raise UnusableWork("its journal is damaged")
        content = json.loads(text)
        if content["fingerprint"] != self.fingerprint:
            raise UnusableWork("it is of another source, of other options or of another version of Pillow or FFCV")
        self.progress = {split: Progress.from_json(account) for split, account in content["progress"].items()}

    def digest(self, *, progress: bool) -> "hashlib._Hash":
        """The running digest over the samples kept, read back from the disk.

        Raises:
            UnusableWork: they are not what was written.
        """
        digest, throughput = hashlib.sha256(), Throughput("read", progress=progress)
        for split, account in self.progress.items():
            digest.update(split.encode())
            try:
                with open(self.stage.result / f"{split}.beton", "rb") as file:
                    self._digest_split(file, split, digest, throughput)
            except FileNotFoundError as error:
                raise UnusableWork(f"its {Path(error.filename).name} is missing") from None
            if digest.hexdigest() != account.digest:
                raise UnusableWork(f"its {split}.beton is damaged or cut short")
        return digest

    def _digest_split(self, file: BinaryIO, split: str, digest: "hashlib._Hash", throughput: Throughput) -> None:
        entries, length = self.entries(split), os.fstat(file.fileno()).st_size
        with throughput.bar(f"checking {split}", len(entries)):
            for entry in entries:
                ((mode, width, height, pointer), label), size = entry.item()
                data = os.pread(file.fileno(), size, pointer) if max(size, pointer) <= length else b""
                update_digest(digest, label, mode, height, width, data)
                throughput.count(1, size)

    def entries(self, split: str) -> np.ndarray:
        """The entries (N, ENTRY) of a split's samples that are kept."""
        if split not in self.progress:
            return np.zeros(0, ENTRY)
        return np.fromfile(self._entries_path(split), ENTRY, self.progress[split].num_samples)

    def _entries_path(self, split: str) -> Path:
        return self.stage.folder / f"{split}.entries"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
