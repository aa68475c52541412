"""Where corrupted validation images come from: CIFAR-C's files, ImageNet-C's folders, or made on the fly."""

import difflib
import importlib.util
import inspect
import re
import zlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from varscale.errors import UserError
from varscale.evaluation.images import Images
from varscale.evaluation.subsets import balanced

SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 32  # of the images that the library takes
INSTALL = "pip install imagecorruptions-imaug"
COMMON = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The fifteen corruptions of ImageNet-C and CIFAR-C (Hendrycks & Dietterich, arXiv 1903.12261), in their order."""


class Source(Protocol):
    """Images of every corruption and severity, cut for the encoder."""

    names: tuple[str, ...]

    def labels(self, name: str, severity: int) -> Tensor:
        """(N,) int64: the classes of its images."""

    def images(self, name: str, severity: int, rows: np.ndarray) -> np.ndarray:
        """Its images number `rows: (n,)`: (n, S, S, 3) uint8."""


class OnTheFly:
    """Evaluation crops of validation images, corrupted by the `imagecorruptions` package: its severities are those of
    ImageNet-C, also for small images, on which CIFAR-C's are milder. A function of (seed, image, corruption, severity).

    Raises UserError where the crops are smaller than the package takes.
    """

    def __init__(self, images: Images, samples: int, names: Sequence[str]) -> None:
        if images.random_crop.size < SMALLEST_SIDE:
            raise UserError(
                f"corruption: the run's images have {images.random_crop.size} pixels a side, but corruptions are made "
                f"of {SMALLEST_SIDE} or more; name a folder of corrupted images by corruption.dir"
            )
        self.names, self.source = tuple(names), images
        self.loader = images.loader("val", images.whole_crop)
        labels = torch.from_numpy(np.asarray(self.loader.labels))
        self.order = balanced(labels, samples, images.seed)
        self._labels = labels[torch.from_numpy(self.order)]

    def labels(self, name: str, severity: int) -> Tensor:
        return self._labels

    def images(self, name: str, severity: int, rows: np.ndarray) -> np.ndarray:
        from joblib import Parallel, delayed

        clean, samples = self.clean(rows), self.order[rows]
        workers = min(self.source.workers, len(rows))
        parts = zip(np.array_split(clean, workers), np.array_split(samples, workers), strict=True)
        tasks = (delayed(corrupt)(part, which, name, severity, self.source.seed) for part, which in parts)
        return np.concatenate(Parallel(n_jobs=workers)(tasks))

    def clean(self, rows: np.ndarray) -> np.ndarray:
        """The crops before they are corrupted: (n, S, S, 3) uint8."""
        with closing(self.loader.batches(self.order[rows][None], 0)) as batches:
            batch = next(batches)
        if batch.skipped:  # the images in their places would be measured by the wrong labels
            raise UserError(f"corruption: {self.loader.beton} has bad samples, named above: leave them out")
        return batch.images[0][:, 0].numpy()


def corrupt(images: np.ndarray, samples: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """Corrupt `images: (n, S, S, 3) uint8`, of validation samples number `samples: (n,)`."""
    import imagecorruptions

    takes_seed = "seed" in inspect.signature(imagecorruptions.corruption_dict[name]).parameters
    corrupted = np.empty_like(images)
    before = np.random.get_state()  # noqa: NPY002 -- the package draws from numpy's global generator
    for i, sample in enumerate(samples):
        entropy = (seed, int(sample), zlib.crc32(name.encode()), severity)
        own = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        np.random.seed(own)  # noqa: NPY002
        extra = {"seed": own} if takes_seed else {}
        corrupted[i] = imagecorruptions.corrupt(images[i], severity, name, **extra)
    np.random.set_state(before)  # noqa: NPY002
    return corrupted


class Arrays:
    """CIFAR-C: labels.npy and, for every corruption, NAME.npy of five equal blocks, from the mildest on."""

    def __init__(self, folder: Path, num_classes: int, size: int, samples: int | None, seed: int) -> None:
        self.size = size
        self.arrays = {path.stem: _open(path) for path in sorted(folder.glob("*.npy")) if path.stem != "labels"}
        self.names = _in_order(self.arrays)
        labels = _open(folder / "labels.npy")
        self.block, rest = divmod(len(labels), len(SEVERITIES))
        for name, array in self.arrays.items():
            if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8 or len(array) != len(labels) or rest:
                raise UserError(
                    f"{folder / name}.npy: expected uint8 images (5 N, H, W, 3), as many as there are labels "
                    f"({len(labels)}), found {array.dtype} of shape {array.shape}"
                )
        own = torch.from_numpy(np.array(labels[: self.block], dtype=np.int64))
        if own.numel() == 0 or int(own.max()) >= num_classes or int(own.min()) < 0:
            raise UserError(f"{folder / 'labels.npy'}: expected classes from 0 to {num_classes - 1}, as the data has")
        self.order = balanced(own, samples, seed)
        self._labels = own[torch.from_numpy(self.order)]

    def labels(self, name: str, severity: int) -> Tensor:
        return self._labels

    def images(self, name: str, severity: int, rows: np.ndarray) -> np.ndarray:
        places = (severity - 1) * self.block + self.order[rows]
        return np.stack([evaluation_crop(np.array(self.arrays[name][place]), self.size) for place in places])


class Folders:
    """ImageNet-C: CORRUPTION/SEVERITY/CLASS/image files, possibly with a folder such as `blur` around corruptions."""

    def __init__(self, folder: Path, classes: Sequence[str], size: int, samples: int | None, seed: int) -> None:
        self.size, self.folder = size, folder
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
        inside += sorted(path for group in inside if not _has_severities(group) for path in group.iterdir())
        found = {path.name: path for path in inside if _has_severities(path)}
        self.names = _in_order(found)
        self.files = {
            (name, severity): _list_images(found[name] / str(severity), classes, samples, seed)
            for name in self.names
            for severity in SEVERITIES
        }

    def labels(self, name: str, severity: int) -> Tensor:
        return self.files[name, severity][1]

    def images(self, name: str, severity: int, rows: np.ndarray) -> np.ndarray:
        paths = self.files[name, severity][0]
        return np.stack([evaluation_crop(_decode(paths[row]), self.size) for row in rows])


def open_folder(folder: Path, images: Images, samples: int | None) -> Source:
    """CIFAR-C's or ImageNet-C's folder. samples: of each corruption and severity at most; None: all.

    Raises UserError where it is neither, or does not fit the data.
    """
    size, seed = images.random_crop.size, images.seed
    if not folder.is_dir():
        raise UserError(f"corruption.dir {folder}: there is no such folder")
    if (folder / "labels.npy").is_file():
        source = Arrays(folder, images.num_classes, size, samples, seed)
    else:
        source = Folders(folder, images.classes, size, samples, seed)
    if not source.names:
        raise UserError(
            f"corruption.dir {folder}: holds neither labels.npy and CORRUPTION.npy (CIFAR-C) nor "
            "CORRUPTION/SEVERITY/CLASS/ folders (ImageNet-C)"
        )
    return source


def check_library(names: Sequence[str]) -> None:
    """Raises UserError where the library is missing, or does not know a corruption."""
    if importlib.util.find_spec("imagecorruptions") is None:
        raise UserError(f"corruption: the package imagecorruptions is not installed; {INSTALL}, or set corruption.dir")
    known = (*COMMON, "speckle_noise", "gaussian_blur", "spatter", "saturate")
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0)[0]
            raise UserError(f"corruption.names: {name!r} is none of {', '.join(known)}; nearest: {nearest}")


def evaluation_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The central `size` x `size` pixels of `image: (H, W, 3) uint8`, resized as `CropSpec` says of scale=None."""
    shorter = min(image.shape[:2])
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    wanted = round(size * 256 / 224) if shorter > size else size
    if shorter != wanted:
        tensor = transforms.resize(tensor, [wanted], antialias=True)
    return transforms.center_crop(tensor, [size, size]).permute(1, 2, 0).numpy()


def _in_order(found: dict[str, object]) -> tuple[str, ...]:
    """The fifteen common corruptions first, in their order; without the four that were made for validation where all
    fifteen are there."""
    common = tuple(name for name in COMMON if name in found)
    return common if len(common) == len(COMMON) else (*common, *(name for name in found if name not in COMMON))


def _open(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _has_severities(path: Path) -> bool:
    return all((path / str(severity)).is_dir() for severity in SEVERITIES)


def _list_images(folder: Path, classes: Sequence[str], samples: int | None, seed: int) -> tuple[list[Path], Tensor]:
    numbers = {name: number for number, name in enumerate(classes)}
    paths, labels = [], []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name not in numbers:
                raise UserError(f"{path}: is none of the data set's {len(classes)} classes, such as {classes[0]}")
            files = sorted(file for file in path.iterdir() if re.fullmatch(r"\.(jpe?g|png)", file.suffix.lower()))
            paths += files
            labels += [numbers[path.name]] * len(files)
    if not paths:
        raise UserError(f"{folder}: holds no class folders with images")
    rows = balanced(torch.tensor(labels), samples, seed)
    return [paths[row] for row in rows], torch.tensor(labels)[torch.from_numpy(rows)]


def _decode(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path}: cannot be decoded ({error})") from None
