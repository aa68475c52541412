"""The images that bench_loader.py loads, in every loader's form: from a tar, folder or .npz archive, or made here."""

import random
import tarfile
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from loader_contenders import Images
from PIL import Image

from varscale.data.beton import BetonWriter
from varscale.data.images import ImageOptions, StoredImage, encode_chunk
from varscale.data.sources import open_source
from varscale.data.sources.splits import IMAGE_SUFFIXES
from varscale.errors import UserError

DISTINCT = 256  # images that are made here
JPEG_QUALITY = 90  # makes smooth noise as large as ImageNet's files, some 120 KB


def are_arrays(name: str) -> bool:
    """Whether the images of this name are 32x32 arrays, or the like, rather than files."""
    return name == "cifar" or name.endswith(".npz")


def write_images(name: str, count: int, folder: Path) -> str:
    """Writes `count` images for all loaders, repeating them where there are fewer; returns a description of them.

    Args:
        name: `synthetic`, `cifar`, or the path of a .tar or folder of JPEG or PNG files or of an .npz archive.
        count: how many to write.
        folder: becomes what `Images` describes.

    Raises:
        UserError: there are no such images, or some cannot be decoded.
    """
    contents = contents_of(name, count, folder)
    stored = encode_chunk(contents, ImageOptions(jpeg_quality=None if are_arrays(name) else JPEG_QUALITY)).images
    images = Images(folder)
    with BetonWriter(images.beton, count) as writer:
        for index, image in enumerate(islice(cycle(stored), count)):
            if not isinstance(image, StoredImage) or (image.storage == "raw") != are_arrays(name):
                reason = image if isinstance(image, str) else "it is so small that it would be stored without JPEG"
                raise UserError(f"{name}: image {contents[index]} cannot be used: {reason}; leave it out")
            writer.append(image.mode, image.height, image.width, image.data, label=0)
            if not are_arrays(name):
                Path(images.jpeg(index)).write_bytes(image.data)
    if are_arrays(name):
        np.save(images.array, np.resize(np.stack(contents), (count, *contents[0].shape)))
    height, width = (int(np.median([getattr(image, side) for image in stored])) for side in ("height", "width"))
    kilobytes = sum(len(image.data) for image in stored) / len(stored) / 1000
    form = "raw" if are_arrays(name) else "JPEG"
    return f"{count:,} {form} images ({len(stored):,} different), {width} x {height}, {kilobytes:.0f} KB each"


def contents_of(name: str, count: int, folder: Path) -> Sequence[str | np.ndarray]:
    """At most `count` images, as varscale's conversion takes them."""
    rng = np.random.default_rng(0)
    if name == "cifar":
        return list(rng.integers(0, 256, (min(count, DISTINCT), 32, 32, 3), np.uint8))
    if name == "synthetic":
        return [_write_noise(folder / f"noise{index}.jpg", rng) for index in range(min(count, DISTINCT))]
    if name.endswith(".npz"):
        split = open_source(f"npz:{name}").train
        return [split.content(index) for index in range(min(count, len(split.labels)))]
    root = Path(name)
    if root.suffix == ".tar":
        root = folder / "extracted"
        try:
            with tarfile.open(name) as archive:
                archive.extractall(root, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"cannot extract {name}: {error}") from None
    files = sorted(str(file) for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{name} holds no .jpg, .jpeg or .png file; 'synthetic' and 'cifar' need none")
    random.Random(0).shuffle(files)
    return files[:count]


def _write_noise(path: Path, rng: np.random.Generator) -> str:
    """A JPEG of ImageNet's usual size with the spectrum of photographs: amplitudes fall as 1 / frequency."""
    height, width = 375, 500
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency, (height, width))
    noise += 2 * noise.mean(0)  # colours vary less than brightness
    pixels = 128 + 50 * noise.transpose(1, 2, 0) / noise.std()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=JPEG_QUALITY)
    return str(path)
