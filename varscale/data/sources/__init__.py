"""Where images come from: digits, CIFAR, arrays, class folders and tar archives, each as lazily read splits."""

import difflib
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from varscale.data.sources.cifar import open_cifar
from varscale.data.sources.digits import DIGIT_SIZES, open_digits
from varscale.data.sources.imagefolder import open_imagefolder
from varscale.data.sources.npz import open_npz
from varscale.data.sources.splits import ArraySplit, Source, Split, first_of_each_class
from varscale.data.sources.tar import open_tar
from varscale.data.sources.webdataset import open_webdataset
from varscale.errors import UserError

__all__ = ["DIGIT_SIZES", "ArraySplit", "Source", "Split", "open_source"]

AT_A_PLACE = {
    "npz": open_npz,
    "imagefolder": open_imagefolder,
    "tar": open_tar,
    "webdataset": open_webdataset,
}
KINDS = ("digits", "cifar10", "cifar100", "npz:FILE", "imagefolder:DIR", "tar:FILE", "tar:TRAIN,VAL", "webdataset:DIR")


def open_source(
    spec: str,
    *,
    image_size: int | None = None,
    download_dir: Path | None = None,
    per_class: tuple[int, int] | None = None,
) -> Source:
    """Opens a source by its name.

    Args:
        spec: one of KINDS.
        image_size: side of the digits' images, 32 (default) or 16; for `digits` only.
        download_dir: where CIFAR's archives lie or are downloaded to; for `cifar10` and `cifar100` only.
        per_class: take so many images of each class only, the first ones, of train and of val.

    Raises:
        UserError: no such source; an option of another source; files missing, unreadable or of the wrong form; fewer
            than two classes; equal names; a class without images in train or in val.
    """
    kind, _, location = spec.partition(":")
    if image_size is not None and kind != "digits":
        raise UserError(f"--image-size is for the source digits only, not for {spec}; see --max-resolution")
    if download_dir is not None and kind not in ("cifar10", "cifar100"):
        raise UserError(f"--download-dir is for the sources cifar10 and cifar100 only, not for {spec}")
    if kind in AT_A_PLACE and location:
        source = AT_A_PLACE[kind](spec, location)
    elif spec in ("cifar10", "cifar100"):
        source = open_cifar(spec, download_dir or Path.home() / ".cache" / "varscale")
    elif spec == "digits":
        source = open_digits(image_size or DIGIT_SIZES[0])
    else:
        raise UserError(f"unknown source '{spec}'{_hint(spec, kind)}; accepted: {', '.join(KINDS)}")
    _check_classes(source)
    return _smaller(source, *per_class) if per_class else source


def _smaller(source: Source, train: int, val: int) -> Source:
    splits = {"train": first_of_each_class(source.train, train), "val": first_of_each_class(source.val, val)}
    note = f"of each class the first {train:,} images of train and {val:,} of val"
    options = source.options | {"train_per_class": train, "val_per_class": val}
    return replace(source, **splits, options=options, notes=(*source.notes, note))


def _hint(spec: str, kind: str) -> str:
    if os.path.isdir(spec):
        return f" (for a folder with train/ and val/ write imagefolder:{spec})"
    if spec.endswith(".npz"):
        return f" (for an archive of arrays write npz:{spec})"
    if spec.endswith(".tar"):
        return f" (for train/ and val/ in a tar file write tar:{spec})"
    near = difflib.get_close_matches(kind.lower(), [known.partition(":")[0] for known in KINDS], n=1)
    return f" (did you mean {next(known for known in KINDS if known.startswith(near[0]))}?)" if near else ""


def _check_classes(source: Source) -> None:
    if len(source.classes) < 2:
        raise UserError(f"{source.spec}: only one class ({source.classes[0]}); at least two are needed")
    twice = [name for name, count in Counter(source.classes).items() if count > 1]
    if twice:
        raise UserError(f"{source.spec}: the class name '{twice[0]}' occurs more than once")
    for split in ("train", "val"):
        counts = np.bincount(source.split(split).labels, minlength=len(source.classes))
        if not counts.all():
            raise UserError(f"{source.spec}: class '{source.classes[int(np.argmin(counts))]}' has no images in {split}")
