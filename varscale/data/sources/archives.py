"""Images inside tar archives, listed once and then read where they lie."""

import os
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from varscale.data.images import FilePart
from varscale.data.sources.splits import Names
from varscale.errors import UserError

BLOCK = 512  # bytes of a tar's header, and of the zeros that end it
UNPACK = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


class Member(NamedTuple):
    """A file in an archive: its path there, and where its contents lie, in bytes."""

    name: str
    offset: int
    size: int


class Members(NamedTuple):
    """Files in archives: their names, and `places` (N, 3) int64: the archive's number, offset and size."""

    archives: tuple[Path, ...]
    names: Names
    places: np.ndarray

    @classmethod
    def listed(cls, archives: Iterable[Path], members: Iterable[tuple[int, Member]]) -> "Members":
        places = array("q")

        def names() -> Iterator[str]:
            for archive, (name, offset, size) in members:
                places.extend((archive, offset, size))
                yield name

        return cls(tuple(archives), Names(names()), np.array(places).reshape(-1, 3))

    def take(self, order: np.ndarray) -> "Members":
        return Members(self.archives, Names(self.names[index] for index in order), self.places[order])


@dataclass(frozen=True)
class ArchiveSplit:
    """Images in archives; `labels` is (N,) int64."""

    members: Members
    labels: np.ndarray

    def content(self, index: int) -> FilePart:
        archive, offset, size = self.members.places[index].tolist()
        return FilePart(str(self.members.archives[archive]), offset, size)

    def name(self, index: int) -> str:
        return f"{self.members.archives[self.members.places[index, 0]].name}:{self.members.names[index]}"

    def identity(self) -> Iterator[bytes]:
        for archive in self.members.archives:
            status = archive.stat()
            yield f"{archive.name} {status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogateescape")
        yield from self.members.names.identity()
        yield self.members.places.tobytes()
        yield self.labels.tobytes()


def members_of(path: Path) -> Iterator[Member]:
    """The regular files of a tar, in its order, hidden ones aside.

    Raises:
        UserError: it cannot be read, is compressed, truncated or damaged, or no tar.
    """
    try:
        with open(path, "rb") as file:
            _refuse_compressed(path, file.read(8))
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # which would hold a kilobyte for every file
                    name = os.path.normpath(member.name)
                    if member.isreg() and not any(part.startswith(".") for part in name.split("/")):
                        yield Member(name, member.offset_data, member.size)
                # tarfile takes whatever is no header for the end.
                file.seek(archive.offset)
                if file.read(BLOCK) != bytes(BLOCK):
                    raise UserError(f"{path} is truncated or damaged at byte {archive.offset:,}: get it again")
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a whole tar file ({error})") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _refuse_compressed(path: Path, start: bytes) -> None:
    for magic, command in UNPACK.items():
        if start.startswith(magic):
            raise UserError(
                f"{path} is compressed, so that no image can be read by itself: unpack it by {command} --keep {path}"
            )
