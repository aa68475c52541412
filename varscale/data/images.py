"""Turns an image file or an array into the bytes that a .beton stores: an upright RGB image, raw or as a JPEG."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from varscale.data import libffcv
from varscale.data.beton import LARGEST_PAGE, MAX_SIDE, MODE_JPEG, MODE_RAW
from varscale.data.jpeg_header import frame_size
from varscale.errors import UserError

DEFAULT_JPEG_QUALITY = 95
SMALL_PIXELS = 64 * 64  # lossless images up to this many pixels stay raw: JPEG would save little and cost detail

EXIF_ORIENTATION = 0x0112
TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageOptions:
    """How images are stored.

    Attributes:
        max_resolution: larger images are shrunk (Lanczos) until their longer side has this many pixels.
        jpeg_quality: of the JPEGs made here; None keeps lossless sources raw and re-encodes JPEGs that must change
            with `DEFAULT_JPEG_QUALITY`.
    """

    max_resolution: int | None = None
    jpeg_quality: int | None = None


class FilePart(NamedTuple):
    """A JPEG or PNG file inside another file: where it begins and how long it is, in bytes."""

    path: str
    offset: int
    size: int


# A path of a JPEG or PNG file, a part of a file, or a uint8 array (height, width, 3) RGB or (height, width) grey.
Content = str | FilePart | np.ndarray


class StoredImage(NamedTuple):
    """An image as stored.

    `storage` is `raw` ((height, width, 3) values), `kept` (the source's own JPEG), `jpeg` (encoded here), or `mended`:
    encoded here because the source's JPEG is damaged in a way that Pillow overlooks and FFCV's decoder does not.
    """

    storage: Literal["raw", "kept", "jpeg", "mended"]
    height: int
    width: int
    data: bytes

    @property
    def mode(self) -> int:
        return MODE_RAW if self.storage == "raw" else MODE_JPEG


class StoredChunk(NamedTuple):
    """Some consecutive images of a source."""

    images: list[StoredImage | str]  # or why the image cannot be decoded
    histogram: np.ndarray  # (3, 256) int64: how often each value occurs in each channel of the decoded images

    @property
    def num_bytes(self) -> int:
        """How many bytes the images are stored in."""
        return sum(len(image.data) for image in self.images if isinstance(image, StoredImage))


class UndecodableImage(Exception):
    """A file that is not a complete image of a known kind; the message says why, without the file's name."""


def encode_chunk(contents: Sequence[Content], options: ImageOptions) -> StoredChunk:
    """Encodes images one by one.

    Raises:
        UserError: a file cannot be read (as opposed to: cannot be decoded).
    """
    images: list[StoredImage | str] = []
    histogram = np.zeros((3, 256), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata, with no file name
        for content in contents:
            try:
                encode = _encode_array if isinstance(content, np.ndarray) else _encode_file
                stored, pixels = encode(content, options)
            except UndecodableImage as error:
                images.append(str(error))
                continue
            images.append(stored)
            histogram += np.array(pixels.histogram(), np.int64).reshape(3, 256)
    return StoredChunk(images, histogram)


def _encode_array(array: np.ndarray, options: ImageOptions) -> tuple[StoredImage, Image.Image]:
    image = _shrunk(Image.fromarray(array).convert("RGB"), options.max_resolution)
    return _store(image, options, lossless=True)


def _encode_file(place: str | FilePart, options: ImageOptions) -> tuple[StoredImage, Image.Image]:
    data = read(place)
    if not data:
        raise UndecodableImage("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        lossless, mended = image.format == "PNG", False
        if not lossless and _can_be_kept(image, options):
            decoded = _decode_as_loader(data, image)
            if decoded is not None:
                return StoredImage("kept", image.height, image.width, data), decoded
            mended = True
        image = _shrunk(upright_rgb(image), options.max_resolution)
    except UnidentifiedImageError:
        raise UndecodableImage("not a JPEG or PNG image") from None
    except Exception as error:  # a decoder given damaged bytes may raise anything
        raise UndecodableImage(" ".join(str(error).split()) or type(error).__name__) from error
    stored, decoded = _store(image, options, lossless)
    return stored._replace(storage="mended") if mended else stored, decoded


def read(place: str | FilePart) -> bytes:
    """A file's bytes. Raises UserError when they cannot be read."""
    path, offset, size = place if isinstance(place, FilePart) else (place, 0, -1)
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if len(data) < size:
        raise UserError(f"cannot read {path}: it has become shorter since it was listed")
    return data


def _can_be_kept(image: Image.Image, options: ImageOptions) -> bool:
    """Whether a JPEG's own bytes show, to a decoder that knows no EXIF and no CMYK, the upright RGB image."""
    fits = max(image.size) <= min(options.max_resolution or MAX_SIDE, MAX_SIDE)
    return fits and image.mode == "RGB" and _orientation(image) not in TO_UPRIGHT


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata says nothing about the picture
        return 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image as a person sees it: turned as its EXIF says, transparent parts on white, 8 bits a channel."""
    orientation = _orientation(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip rather than scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image.transpose(TO_UPRIGHT[orientation]) if orientation in TO_UPRIGHT else image


def _shrunk(image: Image.Image, max_resolution: int | None) -> Image.Image:
    if max_resolution is None or max(image.size) <= max_resolution:
        return image
    width, height = (max(1, round(side * max_resolution / max(image.size))) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _store(image: Image.Image, options: ImageOptions, lossless: bool) -> tuple[StoredImage, Image.Image]:
    """Encodes an RGB image; returns what is stored, and the image that a reader of it will see."""
    if max(image.size) > MAX_SIDE:
        raise UndecodableImage(f"{image.width}x{image.height} pixels, over {MAX_SIDE} a side: use --max-resolution")
    if lossless and (options.jpeg_quality is None or image.width * image.height <= SMALL_PIXELS):
        data = image.tobytes()
        if len(data) > LARGEST_PAGE:
            raise UndecodableImage(f"{len(data):,} bytes raw, over {LARGEST_PAGE:,}: use --max-resolution")
        return StoredImage("raw", image.height, image.width, data), image
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=options.jpeg_quality or DEFAULT_JPEG_QUALITY)
    data = buffer.getvalue()
    decoded = _decode_as_loader(data, Image.open(io.BytesIO(data)))
    assert decoded is not None, "a JPEG just made by Pillow must decode"
    return StoredImage("jpeg", image.height, image.width, data), decoded


def _decode_as_loader(data: bytes, image: Image.Image) -> Image.Image | None:
    """A JPEG's pixels as training will see them, or None where the loader would complain.

    It complains of files that Pillow still reads (wrong codes, bytes between markers): kept as they are, they would
    stop a training run later. Where FFCV is not installed, Pillow decodes, and raises for truncated files.
    """
    if frame_size(data) != (image.height, image.width):
        return None
    decode = libffcv.imdecode()
    if decode is None:
        image.load()
        return image
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    status = decode(data, len(data), height, width, pixels.ctypes.data, height, width, 0, 0, 1, 1, False, False)
    return Image.fromarray(pixels) if status == 0 else None
