"""Pictures that suit a page: as SVG in the page's own colour of text, and as PNG on white for everywhere else."""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from varscale.reporting.content import Picture

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of middle lightness, with a contrast of 3 to white and to black at least, and told apart by colour-blind people.
COLOURS = ("#2a7fd4", "#dd6a10", "#1f9a73", "#cc4b8b", "#8f6fd6", "#a08000", "#1098a8", "#d04a3c")
LINES = ("-", "--", ":", "-.")
GREYS = ("#8a8a8a", "#6f7f8f", "#8f7f6f", "#7f8f6f")
LEGEND_ROW = 0.17  # inches
INK = "#010203"  # stands for the colour of the page's text
NAME_LENGTH = 44
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "varscale",  # the same picture gives the same bytes
    "text.parse_math": False,  # names may hold dollars
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#808080",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def picture(
    name: str, title: str, draw: "Callable[[Axes], object]", *, width: float = 4.2, height: float = 2.9
) -> Picture:
    """What `draw` draws into the axes it is given; width and height in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        return Picture(name, title, _png(figure), _svg(figure, name))


def legend(axis: "Axes", handles: "Sequence[Artist]", names: Sequence[str]) -> None:
    """Below the axes, where there is more than one name to tell apart."""
    of_name = dict(zip(names, handles, strict=True))
    if len(of_name) > 1:
        # A label that begins with an underscore would be left out.
        labels = [f" {name}" if len(name) <= NAME_LENGTH else f" …{name[1 - NAME_LENGTH :]}" for name in of_name]
        columns = 2 if max(map(len, labels)) < 22 else 1
        figure = axis.figure
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * -(-len(labels) // columns))
        figure.legend(of_name.values(), labels, loc="outside lower center", ncols=columns)


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _svg(figure: "Figure", name: str) -> str:
    """An <svg> element for a page: no prologue, no name spaces, and no id that another picture has too."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", dpi=160, transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace("xlink:href", "href")
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    return re.sub(r'^<svg width="[^"]*" height="[^"]*"', '<svg role="img"', text)
