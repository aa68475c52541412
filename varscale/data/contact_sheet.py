"""Draws samples beside the views that a network sees of them: the loader's crops, augmented as in training."""

import io
import os
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from varscale.config.schema import DataConfig
from varscale.data.augment import Augmentation
from varscale.data.beton import BetonSummary
from varscale.data.decoders import installed_decoder
from varscale.data.geometry import training_crops
from varscale.data.inspection import Contents
from varscale.data.loader import LoaderError, ViewLoader
from varscale.data.names import sample_name
from varscale.errors import UserError

SMALLEST_CELL = 96  # pixels; smaller views are enlarged by a whole factor, so that each of their pixels stays one
GAP, MARGIN, LABELS = 6, 24, 210
INK, PALE, PAPER = (30, 34, 40), (120, 126, 134), (255, 255, 255)
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # DejaVu, which has the letters of most languages
BOLD, PLAIN, SMALL = (
    ImageFont.truetype(FONTS / name, size)
    for name, size in (("DejaVuSans-Bold.ttf", 14), ("DejaVuSans.ttf", 13), ("DejaVuSans.ttf", 11))
)


def contact_sheet(contents: Contents, data: DataConfig, *, rows: int, seed: int) -> Image.Image:
    """A row for each sample, with its name, the stored image and its views, those of one size beside each other.

    Args:
        contents: the first of its splits is drawn.
        data: number, sizes, crops and augmentation of the views.
        rows: how many samples, spread over the classes.
        seed: of the choice of samples and of the views.
    """
    split, beton = next(iter(contents.betons.items()))
    summary = contents.summaries[split]
    indices = spread(summary.labels, summary.num_samples, rows, seed)
    blocks = views_of(beton, contents, data, indices, seed)
    cells = [-(-SMALLEST_CELL // views.shape[2]) * views.shape[2] for views in blocks]
    stored = [_fitted(stored_image(beton, summary, index), cells[0]) for index in indices]
    lefts, right = _columns(max(image.width for image in stored), blocks, cells)
    top, height = MARGIN + 64, max(cells) + GAP
    sheet = Image.new("RGB", (right, top + len(indices) * height - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), str(beton), INK, BOLD)
    draw.text((MARGIN, MARGIN + 20), _settings(data, seed), PALE, PLAIN)
    for left, title in zip(lefts, ["stored", *(f"view {view + 1}" for view in range(len(lefts) - 1))], strict=True):
        draw.text((left, top - 6), title, PALE, SMALL, anchor="ls")
    for row, index in enumerate(indices.tolist()):
        y = top + row * height
        _label(draw, (MARGIN, y + 2), contents, split, index)
        sheet.paste(stored[row], (lefts[0], y))
        seen = [(view, cell) for views, cell in zip(blocks, cells, strict=True) for view in views[row]]
        for left, (view, cell) in zip(lefts[1:], seen, strict=True):
            sheet.paste(Image.fromarray(view).resize((cell, cell), Image.Resampling.NEAREST), (left, y))
    return sheet


def _columns(first: int, blocks: list[np.ndarray], cells: list[int]) -> tuple[list[int], int]:
    """Where the stored images, which are up to `first` pixels wide, and each view begin; and the sheet's right edge."""
    lefts = [MARGIN + LABELS]
    right = lefts[0] + first + GAP
    for views, cell in zip(blocks, cells, strict=True):
        lefts += [right + GAP + view * (cell + GAP) for view in range(views.shape[1])]
        right = lefts[-1] + cell + GAP
    return lefts, right - GAP + MARGIN


def _label(draw: ImageDraw.ImageDraw, place: tuple[int, int], contents: Contents, split: str, index: int) -> None:
    summary = contents.summaries[split]
    label = "" if summary.labels is None else f"label {summary.labels[index]}, "
    name = os.path.basename(sample_name(contents.betons[split].parent, split, index) or "")
    for line, (text, ink, font) in enumerate(
        [
            (contents.class_name(summary, index), INK, BOLD),
            (f"{label}sample {index:,}", PALE, PLAIN),
            (name, PALE, SMALL),
        ]
    ):
        draw.text((place[0], place[1] + 20 * line), shortened(text, font, LABELS - 2 * GAP), ink, font)


def _settings(data: DataConfig, seed: int) -> str:
    scales = zip(data.views_by_size, (data.crop_scale, data.local_scale), strict=False)
    blocks = [f"{size} pixels, crops of {low:g} to {high:g} of the area" for size, (low, high) in scales]
    if data.augmentation == "none":
        blocks = [f"{size} pixels, the evaluation crop" for size in data.views_by_size]
    return f"{data.augmentation}, {'; '.join(blocks)}; seed {seed}"


def views_of(beton: Path, contents: Contents, data: DataConfig, indices: np.ndarray, seed: int) -> list[np.ndarray]:
    """The views of samples as training makes them, without its normalisation.

    Returns for each size (N, V, size, size, 3) uint8. Raises UserError where a sample cannot be loaded.
    """
    mean, std = (contents.info.mean, contents.info.std) if contents.info else ((0.0,) * 3, (1.0,) * 3)
    crops, options = training_crops(data), {"seed": seed, "workers": 1, "decoder": installed_decoder()}
    try:
        with ViewLoader(beton, crops, **options) as loader, loader.batches(indices[None], epoch=0) as batches:
            batch = next(batches)
    except LoaderError as error:
        raise UserError(f"{error}; convert_dataset.py verify names all that is damaged") from None
    blocks, first_view = [], 0
    for cut, (size, count) in zip(batch.images, data.views_by_size.items(), strict=True):
        augmentation = Augmentation(data.augmentation, count, size, mean, std, seed, first_view)
        images = augmentation(cut, batch.indices, epoch=0)
        images = images * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
        pixels = images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1)
        blocks.append(pixels.unflatten(0, (count, len(indices))).transpose(0, 1).contiguous().numpy())
        first_view += count
    return blocks


def spread(labels: np.ndarray | None, num_samples: int, rows: int, seed: int) -> np.ndarray:
    """Up to so many samples, of as many classes as can be, in the order of their labels: (rows,) int64."""
    order = np.random.default_rng(seed).permutation(num_samples)
    if labels is None:
        return np.sort(order[:rows])
    # The first sample of every class in a random order of samples, then the second of every class, and so on.
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[by_class])
    rounds = np.arange(num_samples) - starts
    places = np.argsort(order)[by_class]
    chosen = by_class[np.lexsort((places, rounds))][:rows]
    return chosen[np.argsort(labels[chosen], kind="stable")]


def stored_image(beton: Path, summary: BetonSummary, index: int) -> Image.Image:
    """A sample as it lies in the file."""
    with open(beton, "rb") as file:
        data = os.pread(file.fileno(), int(summary.num_bytes[index]), int(summary.offsets[index]))
    if summary.is_jpeg[index]:
        return Image.open(io.BytesIO(data)).convert("RGB")
    return Image.frombytes("RGB", (int(summary.widths[index]), int(summary.heights[index])), data)


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    """The image as large as fits into a cell's height and one and a half times its width."""
    scale = min(cell / image.height, 1.5 * cell / image.width)
    filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), filter_)


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or as much of its beginning as is at most `width` pixels wide, and dots."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
