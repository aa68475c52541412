"""What the evaluators' pictures have in common: figures that need no display, and colours that can be told apart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8c8c8c"  # of Okabe and Ito's palette: also colour-blind people tell them
MOST_LEGEND_ENTRIES = 20


def new_figure(columns: int = 1, *, width: float = 5.5, height: float = 4.5) -> "tuple[Figure, Sequence[Axes]]":
    """A figure of `columns` panels, each of so many inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def class_colours(count: int) -> np.ndarray:
    """(count, 4) RGBA: different hues, and beyond ten classes alternating lightness."""
    import matplotlib

    if count <= 10:
        return matplotlib.colormaps["tab10"](np.arange(count))
    if count <= 20:
        return matplotlib.colormaps["tab20"](np.arange(count))
    colours = matplotlib.colormaps["hsv"](np.linspace(0, 1, count, endpoint=False))
    colours[:, :3] *= np.where(np.arange(count) % 2, 0.6, 0.9)[:, None]
    return colours
