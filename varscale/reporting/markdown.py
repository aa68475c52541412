"""A report as Markdown, its pictures in files beside it."""

import re
from collections.abc import Iterator, Sequence

from varscale.reporting.content import Block, Fold, Gallery, Items, Paragraph, Report, Table

FIGURES = "figures"


def to_markdown(report: Report) -> str:
    """The text; it refers to `figures/NAME.png` for every picture of the report."""
    lines = [f"# {escaped(report.title)}"]
    for section in report.sections:
        lines += ["", f"## {escaped(section.title)}", *_blocks(section.blocks)]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text that shall be read as it is, in one line."""
    text = re.sub(r"([\\|`*\[\]~#])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))
    return " ".join(text.split())


def _blocks(blocks: Sequence[Block]) -> Iterator[str]:
    for block in blocks:
        yield ""
        if isinstance(block, Paragraph):
            yield escaped(block.text)
        elif isinstance(block, Items):
            yield from (f"- {escaped(item)}" for item in block.items)
        elif isinstance(block, Table):
            yield from _table(block)
        elif isinstance(block, Gallery):
            for picture in block.pictures:
                yield f"**{escaped(picture.title)}**\n\n![{escaped(picture.title)}]({FIGURES}/{picture.name}.png)\n"
        elif isinstance(block, Fold):
            yield f"### {escaped(block.title)}"
            yield from _blocks(block.blocks)
        else:
            # Indented, not fenced: nothing in the text can end it.
            yield from (f"    {line}" for line in block.text.splitlines())


def _table(table: Table) -> Iterator[str]:
    yield _row([column.text for column in table.columns])
    yield _row(["---" if column.kind == "label" else "---:" for column in table.columns], plain=True)
    for row in table.rows:
        yield _row([cell or "-" for cell in row])


def _row(cells: Sequence[str], *, plain: bool = False) -> str:
    return f"| {' | '.join(cells if plain else map(escaped, cells))} |"
