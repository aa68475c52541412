#!/usr/bin/env python
"""Draws the training images nearest to a query, by the cosine similarity of a trained encoder's features.

python tools/nearest_images.py --checkpoint runs/mine --data data/mine --query 17 photo.jpg --out nearest.png
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import varscale  # before torch: it sets how OpenMP waits

# isort: split
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch.nn import functional as F

from varscale.data.augment import Augmentation
from varscale.data.contact_sheet import BOLD, GAP, INK, MARGIN, PALE, PAPER, PLAIN, SMALL, shortened, stored_image
from varscale.data.decoders import installed_decoder
from varscale.data.images import upright_rgb
from varscale.data.inspection import Contents, open_contents
from varscale.data.loader import LoaderError, ViewLoader
from varscale.encoder.loading import Encoder
from varscale.errors import UserError
from varscale.evaluation.features import extract_features

CELL, CAPTION = 112, 34  # pixels: a picture's side, and the height of the lines below it
COLUMNS = 10  # neighbours in a line
OTHER_CLASS = (190, 60, 40)


@dataclass(frozen=True)
class Query:
    """A picture, what it is called, and its class where that is known."""

    image: Image.Image
    title: str
    class_name: str = ""


class Neighbour(NamedTuple):
    """A training sample, and the cosine of the angle between its features and the query's."""

    index: int
    similarity: float


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse(arguments)
    try:
        contents = _check(options)
        queries = [open_query(text, contents) for text in options.query]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        encoder = varscale.load_encoder(options.checkpoint, data=options.data, device=device)
        found = nearest(encoder, queries, contents, options.k)
        title = f"{options.checkpoint}: nearest training images of {options.data}, by cosine similarity"
        try:
            draw(title, queries, found, contents).save(options.out, "PNG")
        except OSError as error:
            raise UserError(f"--out {options.out}: cannot be written ({error.strerror or error})") from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for query, neighbours in zip(queries, found, strict=True):
        names = [f"{caption(contents, n.index) or n.index} {n.similarity:.3f}" for n in neighbours]
        print(f"{query.title}{query.class_name and f' ({query.class_name})'}: {', '.join(names)}")
    print(options.out)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="RUN", help="a run, a checkpoint in it, or a .safetensors")
    add("--data", type=Path, required=True, metavar="DIR", help="the converted data set to search")
    add("--query", nargs="+", required=True, help="numbers of validation samples, or image files (./17 for a file 17)")
    add("--k", type=int, default=COLUMNS, help="how many images (default: %(default)s)")
    add("--out", type=Path, default=Path("nearest.png"), metavar="PNG", help="the drawing (default: %(default)s)")
    return parser.parse_args(arguments)


def open_query(text: str, contents: Contents) -> Query:
    """A validation sample by its number, or an image file. Raises UserError where it is neither."""
    if text.removeprefix("-").isdecimal():
        index, summary = int(text), contents.summaries["val"]
        if not 0 <= index < summary.num_samples:
            raise UserError(
                f"--query {text}: {contents.betons['val']} holds samples 0 to {summary.num_samples - 1:,}; "
                f"a file of this name is ./{text}"
            )
        image = stored_image(contents.betons["val"], summary, index)
        return Query(image, f"validation {index}", contents.class_name(summary, index))
    try:
        with Image.open(text) as file:
            return Query(upright_rgb(file), os.path.basename(text))
    except FileNotFoundError:
        raise UserError(f"--query {text}: there is no such file, and it is not a validation sample's number") from None
    except UnidentifiedImageError:
        raise UserError(f"--query {text}: is not an image that Pillow knows") from None
    except (OSError, SyntaxError) as error:  # Pillow tells of damaged files by either
        raise UserError(f"--query {text}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def nearest(encoder: Encoder, queries: list[Query], contents: Contents, k: int) -> list[list[Neighbour]]:
    """The k training samples most similar to each query, best first. Raises UserError where one cannot be decoded."""
    prepare = encoder.preprocess
    device = next(encoder.parameters()).device
    normalise = Augmentation("none", 1, prepare.crop.size, prepare.mean, prepare.std, seed=0).to(device)
    workers = len(os.sched_getaffinity(0))
    try:
        loader = ViewLoader(
            contents.betons["train"], [prepare.crop], seed=0, workers=workers, decoder=installed_decoder()
        )
        where = {"rank": 0, "world_size": 1, "batch_size": 256, "device": device}
        features = extract_features(encoder, loader, normalise, **where, progress="features of train").features
    except LoaderError as error:
        raise UserError(f"{error}; convert_dataset.py verify names all that is damaged") from None
    wanted = encoder(prepare([query.image for query in queries])).cpu()
    similarity = F.normalize(wanted, dim=1) @ F.normalize(features, dim=1).T
    best = similarity.sort(dim=1, descending=True, stable=True)  # of equal ones the first
    rows = zip(best.indices[:, :k].tolist(), best.values[:, :k].tolist(), strict=True)
    return [[Neighbour(*pair) for pair in zip(*row, strict=True)] for row in rows]


def draw(title: str, queries: list[Query], found: list[list[Neighbour]], contents: Contents) -> Image.Image:
    """A row for each query: the query, then its neighbours with class and similarity; red those of another class."""
    columns = min(COLUMNS, len(found[0]))
    lines = -(-len(found[0]) // columns)
    pitch, height = CELL + GAP, CELL + CAPTION
    left, top = MARGIN + CELL + 4 * GAP, MARGIN + 34
    right = max(left + columns * pitch - GAP, MARGIN + int(BOLD.getlength(title)))
    row_height = lines * height + 2 * GAP
    sheet = Image.new("RGB", (right + MARGIN, top + len(queries) * row_height + MARGIN - 2 * GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, BOLD)
    for row, (query, neighbours) in enumerate(zip(queries, found, strict=True)):
        y = top + row * row_height
        _place(sheet, pen, query.image, (MARGIN, y), (query.class_name or "query", query.title), INK)
        pen.line([(left - 2 * GAP, y), (left - 2 * GAP, y + lines * height - GAP)], PALE)
        for number, neighbour in enumerate(neighbours):
            corner = (left + number % columns * pitch, y + number // columns * height)
            name = caption(contents, neighbour.index)
            ink = OTHER_CLASS if query.class_name and name != query.class_name else INK
            image = stored_image(contents.betons["train"], contents.summaries["train"], neighbour.index)
            _place(sheet, pen, image, corner, (name, f"{neighbour.similarity:.3f}  #{neighbour.index}"), ink)
    return sheet


def caption(contents: Contents, index: int) -> str:
    """The class of a training sample; nothing where it is unknown."""
    return contents.class_name(contents.summaries["train"], index)


def _place(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    image: Image.Image,
    corner: tuple[int, int],
    text: tuple[str, str],
    ink: tuple[int, int, int],
) -> None:
    """A picture in its cell, two lines of text below it."""
    x, y = corner
    larger = max(image.size) < CELL
    fitted = ImageOps.contain(image, (CELL, CELL), Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)
    sheet.paste(fitted, (x + (CELL - fitted.width) // 2, y + (CELL - fitted.height) // 2))
    pen.text((x, y + CELL + 2), shortened(text[0], PLAIN, CELL), ink, PLAIN)
    pen.text((x, y + CELL + 18), shortened(text[1], SMALL, CELL), PALE, SMALL)


def _check(options: argparse.Namespace) -> Contents:
    """The data set, found fit to be searched. Raises UserError."""
    if options.out.suffix.lower() != ".png":
        raise UserError(f"--out {options.out}: its suffix is {options.out.suffix!r}, but must be .png")
    if not options.out.parent.is_dir():
        raise UserError(f"--out {options.out}: the folder {options.out.parent} does not exist")
    if not options.data.is_dir():
        raise UserError(f"--data {options.data}: there is no such folder")
    contents = open_contents(options.data)
    available = contents.summaries["train"].num_samples
    if not 1 <= options.k <= available:
        raise UserError(f"--k is {options.k}, but must be from 1 to {available:,}, the number of training images")
    return contents


if __name__ == "__main__":
    sys.exit(main())
