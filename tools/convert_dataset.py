#!/usr/bin/env python
"""Converts images into the data set that training reads: python tools/convert_dataset.py SOURCE OUT_DIR [options].

`verify DIR` reads a data set again and compares it with what was written; `inspect DIR` shows what is in it.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from varscale.config import load_config
from varscale.config.schema import DataConfig
from varscale.data.conversion import Conversion, UndecodableFiles, check_directory, convert
from varscale.data.images import DEFAULT_JPEG_QUALITY, MAX_SIDE, ImageOptions
from varscale.data.inspection import Contents, describe, open_contents, span
from varscale.data.sources import DIGIT_SIZES, open_source
from varscale.errors import UserError

NAMED_FILES = 20  # undecodable files named on the screen
SMALL_IMAGES = 64  # pixels a side up to which images are trained on as they are, as CIFAR's
VIEWS = 6  # drawn of each sample where no recipe says how many there are
LARGE_VIEWS = 224  # pixels a side of the views of larger ones

DESCRIPTION = """\
Writes OUT_DIR/train.beton, val.beton (FFCV's format), the samples' names and dataset.json: all of them, or nothing.
An interrupted conversion keeps its work beside OUT_DIR; the same command, given again, goes on with it.

commands:
  convert_dataset.py SOURCE OUT_DIR [options]   as below
  convert_dataset.py verify DIR                 reads a data set again and compares it with what was written
  convert_dataset.py inspect DIR                tells what is in it and draws samples as a network sees them

sources:
  digits           scikit-learn's 1,797 handwritten digits; a stratified fifth is held out as val
  cifar10          torchvision's, downloaded where there is a network
  cifar100
  npz:FILE         arrays x_train, y_train, x_test, y_test (uint8 images, integer labels), optionally names
  imagefolder:DIR  DIR/train/CLASS/... and DIR/val/CLASS/...: JPEG or PNG files at any depth
  tar:FILE         the same folders in one tar file, which is read where it lies; it must not be compressed
  tar:TRAIN,VAL    for each split a tar file of CLASS/..., or a folder of CLASS.tar (ImageNet's own train tars;
                   its val.tar has no classes: sort the images into class folders first)
  webdataset:DIR   DIR/train-*.tar and DIR/val-*.tar of KEY.jpg (.jpeg, .png) and KEY.cls, the label's number;
                   DIR/classes.txt may name the classes, one a line
"""
STORAGE = f"""\
how images are stored:
  JPEG files are kept byte for byte. Only those that must change are encoded anew (quality {DEFAULT_JPEG_QUALITY}, or
  --jpeg-quality): larger than --max-resolution, grey, CMYK, turned by EXIF, or refused by FFCV's decoder.
  PNG files and arrays are lossless and stay so: raw, 3 bytes a pixel. With --jpeg-quality those of more than
  64x64 pixels become JPEG. Grey becomes RGB, and what is transparent becomes white.
  Every image is decoded once to see that it can be.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse_conversion(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="convert_dataset.py",
        description=DESCRIPTION,
        epilog=STORAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="where the images are: see above")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="the folder to make")
    parser.add_argument("--max-resolution", metavar="N", type=_whole(1, MAX_SIDE), help="longest side in pixels")
    parser.add_argument("--jpeg-quality", metavar="Q", type=_whole(1, 100), help="quality of JPEGs that are made here")
    _add_workers(parser, "processes")
    parser.add_argument("--skip-bad", action="store_true", help="leave out undecodable images; skipped.txt names all")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set that OUT_DIR holds")
    parser.add_argument("--verify", action="store_true", help="read everything again at the end, as `verify` does")
    parser.add_argument("--fresh", action="store_true", help="drop what an interrupted conversion has kept")
    parser.add_argument("--image-size", type=int, choices=DIGIT_SIZES, help="digits: side in pixels (default: 32)")
    parser.add_argument("--download-dir", metavar="DIR", type=Path, help="cifar10, cifar100: default ~/.cache/varscale")
    few = "of each class only the first N images of train and M of val: a small data set to try things on"
    parser.add_argument("--per-class", metavar="N,M", type=_two_numbers, help=few)
    return parser.parse_args(arguments)


def parse_verification(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="convert_dataset.py verify",
        description="Decodes every image of a data set as training does, and compares counts, labels, names and digest "
        "with what was written. Exit code 2 tells of damage.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the data set")
    _add_workers(parser, "threads")
    return parser.parse_args(arguments)


def parse_inspection(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="convert_dataset.py inspect",
        description="Tells what a data set or a .beton holds, and draws some of its (training) samples beside views of "
        "them, cropped and augmented as in training.",
    )
    parser.add_argument("path", metavar="DIR", type=Path, help="the data set, or one .beton")
    parser.add_argument("--config", metavar="RECIPE", help="take views and augmentation from this recipe")
    policies = get_args(DataConfig.model_fields["augmentation"].annotation)
    parser.add_argument("--augmentation", choices=policies, help="draw this one")
    parser.add_argument("--rows", metavar="N", type=_whole(1, 100), default=8, help="samples (default: 8)")
    views = f"large views of each (default: the recipe's, or {VIEWS})"
    parser.add_argument("--views", metavar="V", type=_whole(1, 20), help=views)
    parser.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, help="of the samples and views (default: 0)")
    parser.add_argument("--out", metavar="PNG", type=Path, help="the drawing (default: NAME-views.png in this folder)")
    return parser.parse_args(arguments)


def _add_workers(parser: argparse.ArgumentParser, kind: str) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers", metavar="N", type=_whole(1, 1024), default=cores, help=f"{kind} (default: the cores)"
    )


def _whole(low: int, high: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {low} to {high}")
        return int(text)

    return whole


def _two_numbers(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is not two whole numbers above 0, as in 1000,500")
    return int(parts[0]), int(parts[1])


def show(conversion: Conversion) -> None:
    """Prints what was made, and what to do next."""
    info = conversion.info
    print(f"{conversion.directory}: {info.source}, {info.num_classes} classes")
    for split, counts in info.counts.items():
        size, per_class = info.image_sizes[split], span(min(counts), max(counts))
        pixels = f"{span(size['min_width'], size['max_width'])} x {span(size['min_height'], size['max_height'])}"
        print(f"  {split:7}{info.num_samples(split):,} images, {per_class} a class, {pixels} pixels")
    for name, values in (("mean", info.mean), ("std", info.std)):
        print(f"  {name:7}" + " ".join(f"{value:.4f}" for value in values))
    kinds = {"kept": "JPEG kept", "jpeg": "JPEG encoded", "mended": "damaged JPEG encoded anew", "raw": "raw"}
    stored = ", ".join(f"{conversion.storage[key]:,} {kind}" for key, kind in kinds.items() if conversion.storage[key])
    print(f"  stored {stored}; {conversion.num_bytes / 1e6:,.1f} MB")
    if conversion.throughput.images:
        print(f"  converted {conversion.throughput}")
    if info.skipped:
        print(f"  skipped {info.skipped:,} undecodable images, named in {conversion.directory / 'skipped.txt'}")
    print(f"  digest {info.digest}")
    recipe = info.source if info.source in ("digits", "cifar10", "cifar100") else _recipe_for(info.image_sizes["train"])
    print(f"next: deepspeed varscale/train.py --config {recipe}-varcon data.dir={conversion.directory}")


def _recipe_for(size: dict[str, int]) -> str:
    return "cifar10" if max(size["max_width"], size["max_height"]) <= SMALL_IMAGES else "imagenet100"


def main(arguments: list[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, 2 for bad input or damage (told on stderr), 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["verify"]:
            options = parse_verification(arguments[1:])
            return run_verification(options.directory, options.workers)
        if arguments[:1] == ["inspect"]:
            return run_inspection(parse_inspection(arguments[1:]))
        return run_conversion(parse_conversion(arguments))
    except UserError as error:
        if isinstance(error, UndecodableFiles):
            _name_files("undecodable:", error.reports)
        _complain(str(error), error)
        return 2
    except KeyboardInterrupt as interrupt:
        _complain("interrupted", interrupt)
        return 130


def run_conversion(options: argparse.Namespace) -> int:
    check_directory(options.out_dir, overwrite=options.overwrite)
    where = {"image_size": options.image_size, "download_dir": options.download_dir}
    source = open_source(options.source, **where, per_class=options.per_class)
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    conversion = convert(
        source,
        options.out_dir,
        image_options=ImageOptions(options.max_resolution, options.jpeg_quality),
        workers=options.workers,
        skip_bad=options.skip_bad,
        overwrite=options.overwrite,
        fresh=options.fresh,
        progress=True,
    )
    if conversion.mended:
        _name_files("damaged, but not beyond decoding (look at them):", conversion.mended)
    show(conversion)
    return run_verification(options.out_dir, options.workers) if options.verify else 0


def run_verification(directory: Path, workers: int) -> int:
    from varscale.data.verification import verify  # torch, which a conversion's workers need not wait for

    verification = verify(directory, workers=workers, progress=True)
    if verification.damage:
        _name_files(f"{directory} is damaged, convert it again:", verification.damage)
        return 2
    print(f"verified {verification.throughput}; digest {verification.info.digest}")
    return 0


def run_inspection(options: argparse.Namespace) -> int:
    from varscale.data.contact_sheet import contact_sheet

    contents = open_contents(options.path)
    print(describe(contents))
    data = _views(contents, options)
    sheet = contact_sheet(contents, data, rows=options.rows, seed=options.seed)
    out = options.out or Path(f"{options.path.resolve().stem}-views.png")
    try:
        sheet.save(out, "PNG")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    print(f"\nviews    {out}")
    return 0


def _views(contents: Contents, options: argparse.Namespace) -> DataConfig:
    chosen = {"augmentation": options.augmentation, "views": options.views}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    if options.config:
        return load_config(options.config, [f"data.{key}={value}" for key, value in chosen.items()]).data
    largest = max(int(max(summary.heights.max(), summary.widths.max())) for summary in contents.summaries.values())
    return DataConfig(image_size=largest if largest <= SMALL_IMAGES else LARGE_VIEWS, **{"views": VIEWS} | chosen)


def _complain(message: str, error: BaseException) -> None:
    print(f"convert_dataset.py: {message}", *getattr(error, "__notes__", []), sep="; ", file=sys.stderr)


def _name_files(title: str, names: list[str]) -> None:
    print(title, *names[:NAMED_FILES], sep="\n  ", file=sys.stderr)
    if len(names) > NAMED_FILES:
        print(f"  and {len(names) - NAMED_FILES:,} more", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminated conversion keeps its work as well
    sys.exit(main())
