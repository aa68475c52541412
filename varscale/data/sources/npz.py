"""Archives of numpy arrays."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from varscale.data.sources.splits import ArraySplit, Source, numbered_classes
from varscale.errors import UserError


def open_npz(spec: str, location: str) -> Source:
    """An archive of x_train, y_train, x_test, y_test and optionally names, as numpy.savez makes it."""
    path = Path(location)
    arrays = _load_npz(path)
    for key in ("x_train", "y_train", "x_test", "y_test"):
        if key not in arrays:
            raise UserError(f"{path} has no array '{key}' (it has: {', '.join(arrays) or 'nothing'})")
    train, val = (_array_split(path, arrays, split) for split in ("train", "test"))
    if "names" in arrays:
        names = arrays["names"]
        if names.ndim != 1 or names.dtype.kind not in "US" or not names.size:
            raise UserError(f"{path}: 'names' is {names.shape} {names.dtype}, but must be (classes,) text")
        classes = tuple(name.decode() if isinstance(name, bytes) else name for name in names.tolist())
    else:
        classes = numbered_classes(train.labels, str(path))
    for key, split in (("y_train", train), ("y_test", val)):
        wrong = (split.labels < 0) | (split.labels >= len(classes))
        if wrong.any():
            first = int(np.argmax(wrong))
            raise UserError(
                f"{path}: {key}[{first}] is {split.labels[first]}, but there are {len(classes)} classes "
                f"(labels 0 to {len(classes) - 1}, {'by names' if 'names' in arrays else 'by the largest in y_train'})"
            )
    return Source(spec, classes, train, val)


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    wanted = ("x_train", "y_train", "x_test", "y_test", "names")
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise UserError(f"{path} holds a single array, not an .npz archive of x_train, y_train, x_test, y_test")
            # Only what is used is read; other arrays are named, for the message.
            return {key: archive[key] if key in wanted else np.empty(0) for key in archive.files}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is not a complete .npz archive of plain arrays: {error}") from None


def _array_split(path: Path, arrays: dict[str, np.ndarray], split: str) -> ArraySplit:
    images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[3:] not in ((), (3,)) or not images.size:
        raise UserError(
            f"{path}: 'x_{split}' is {images.shape} {images.dtype}, but must be uint8 (values 0 to 255) of shape "
            "(images, height, width, 3) or (images, height, width)"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise UserError(f"{path}: 'y_{split}' is {labels.shape} {labels.dtype}, but must be ({len(images)},) integer")
    return ArraySplit(images, labels.astype(np.int64), f"x_{split}")
