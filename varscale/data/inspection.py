"""Tells a person what a converted data set, or a single .beton, holds."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from varscale.data.beton import BetonSummary, check_beton
from varscale.data.dataset import INFO_FILE, SPLITS, DatasetInfo, read_dataset_info
from varscale.data.names import sample_name

FIRST_SAMPLES = 5


@dataclass(frozen=True)
class Contents:
    """One or two .beton files by their split, and their description where it lies beside them."""

    path: Path
    info: DatasetInfo | None
    betons: dict[str, Path]
    summaries: dict[str, BetonSummary]

    def class_name(self, summary: BetonSummary, index: int) -> str:
        """A sample's class; nothing where it has no label, or its class no name."""
        return "" if self.info is None or summary.labels is None else self.info.classes[summary.labels[index]]


def open_contents(path: Path) -> Contents:
    """Reads the metadata of a data set's folder, or of one .beton.

    Raises:
        UserError: it is neither, or damaged.
    """
    if path.is_dir():
        info, betons = read_dataset_info(path), {split: path / f"{split}.beton" for split in SPLITS}
    else:
        is_ours = path.stem in SPLITS and (path.parent / INFO_FILE).exists()
        info, betons = read_dataset_info(path.parent) if is_ours else None, {path.stem: path}
    num_classes = info.num_classes if info else None
    summaries = {
        split: check_beton(beton, num_classes=num_classes, require_labels=False) for split, beton in betons.items()
    }
    return Contents(path, info, betons, summaries)


def describe(contents: Contents) -> str:
    """Counts, classes, sizes, storage, statistics and the first samples, in aligned lines."""
    lines = [*_facts(contents), *_first_samples(contents)]
    width = max(len(key) for key, _ in lines) + 2
    return "\n".join(f"{key:{width}}{text}".rstrip() for key, text in lines)


def span(low: int, high: int) -> str:
    """`3` or `3-12`."""
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _facts(contents: Contents) -> Iterator[tuple[str, str]]:
    info = contents.info
    if info:
        yield "source", info.source
        options = [f"{name} {value}" for name, value in info.options.items() if value is not None]
        yield "options", ", ".join(options) or "none"
        some = ", ".join(info.classes[:6])
        yield "classes", f"{info.num_classes:,}: {some}{', ...' if info.num_classes > 6 else ''}"
    for split, summary in contents.summaries.items():
        yield split, ", ".join(_facts_of_split(summary))
    if info:
        for name, values in (("mean", info.mean), ("std", info.std)):
            yield name, "  ".join(f"{value:.4f}" for value in values)
        if info.skipped:
            yield "skipped", f"{info.skipped:,} undecodable images"
        yield "digest", info.digest


def _facts_of_split(summary: BetonSummary) -> Iterator[str]:
    yield f"{summary.num_samples:,} images"
    if summary.labels is None:
        yield "no labels"
    else:
        counts = np.unique(summary.labels, return_counts=True)[1]
        yield f"{span(counts.min(), counts.max())} a class"
    widths, heights = (span(sides.min(), sides.max()) for sides in (summary.widths, summary.heights))
    yield f"{widths} x {heights} pixels"
    num_jpeg = int(summary.is_jpeg.sum())
    for count, kind in ((num_jpeg, "JPEG"), (summary.num_samples - num_jpeg, "raw")):
        if count:
            yield f"{count:,} {kind}"
    yield f"{summary.num_bytes.sum() / 1e6:,.1f} MB"


def _first_samples(contents: Contents) -> Iterator[tuple[str, str]]:
    for split, summary in contents.summaries.items():
        yield "", ""
        rows = [
            (
                str(index),
                "" if summary.labels is None else f"label {summary.labels[index]}",
                contents.class_name(summary, index),
                f"{summary.widths[index]} x {summary.heights[index]}",
                "JPEG" if summary.is_jpeg[index] else "raw",
                f"{summary.num_bytes[index]:,} bytes",
                sample_name(contents.betons[split].parent, split, index) or "",
            )
            for index in range(min(FIRST_SAMPLES, summary.num_samples))
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield split, "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width)
