"""What a report consists of, whatever its form: sections of texts, tables, pictures and commands."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

PNG_START, PNG_HEADER = b"\x89PNG\r\n\x1a\n", 24  # bytes, the size of the picture among them
ColumnKind = Literal["label", "run", "baseline", "published"]


@dataclass(frozen=True)
class Paragraph:
    """A few sentences."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Items:
    """A list of remarks."""

    kind: ClassVar[str] = "items"
    items: Sequence[str]


@dataclass(frozen=True)
class Commands:
    """Command lines to copy."""

    kind: ClassVar[str] = "commands"
    text: str


@dataclass(frozen=True)
class Column:
    """The head of a column; labels are texts, all others hold numbers."""

    text: str
    kind: ColumnKind = "run"


@dataclass(frozen=True)
class Table:
    """Rows of cells, one for each column; an empty cell is shown as a dash."""

    kind: ClassVar[str] = "table"
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """One picture, twice.

    Attributes:
        name: of its file, without ending; no other picture of the report has it.
        svg: to stand in a page, in the page's colour of text; empty where there is only `png`.
        png: on white.
    """

    name: str
    title: str
    png: bytes
    svg: str = ""

    @property
    def is_panorama(self) -> bool:
        """Whether it is so wide that, shrunk to a phone's width, it could not be read."""
        width, height = struct.unpack(">II", self.png[PNG_HEADER - 8 : PNG_HEADER])
        return width > 2 * height


@dataclass(frozen=True)
class Gallery:
    """Pictures beside each other: small ones have no axes, wide ones several panels."""

    kind: ClassVar[str] = "gallery"
    pictures: Sequence[Picture]
    size: Literal["small", "normal", "wide"] = "normal"


@dataclass(frozen=True)
class Fold:
    """What is shown when its title is clicked."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: Sequence["Block"]


Block = Paragraph | Items | Commands | Table | Gallery | Fold


@dataclass(frozen=True)
class Section:
    """A headed part of the report."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Report:
    """The whole of it."""

    title: str
    sections: Sequence[Section]

    def pictures(self) -> list[Picture]:
        """All pictures, in order."""
        return [picture for section in self.sections for picture in _pictures(section.blocks)]


def is_png(content: bytes) -> bool:
    """Whether a file's content begins as a PNG does."""
    return content.startswith(PNG_START) and len(content) >= PNG_HEADER


def _pictures(blocks: Sequence[Block]) -> list[Picture]:
    found: list[Picture] = []
    for block in blocks:
        if isinstance(block, Gallery):
            found += block.pictures
        elif isinstance(block, Fold):
            found += _pictures(block.blocks)
    return found
