"""Images, sources of them, and what a .beton holds of them: shared by the tests of the conversion."""

import io

import numpy as np
from PIL import Image

from varscale.data.beton import ALLOCATION, FIELD, HEADER, MODE_RAW, SAMPLE
from varscale.data.sources import ArraySplit, Source, open_source


def picture(height=40, width=60, channels=3):
    """A smooth picture with a corner of its own colour, so that JPEG keeps it well and every turn of it differs."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = 255 * rows / height, 255 * columns / width
    pixels = np.stack([red, green, 255 - (red + green) / 2], 2).astype(np.uint8)
    pixels[: height // 3, : width // 4] = (250, 250, 0)
    return Image.fromarray(pixels if channels == 3 else pixels[..., 1])


def folder_source(root, train, val=None):
    """A source of files: {"cat/a.jpg": an image's bytes}; each class also gets one good image in each split."""
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    for split, files in (("train", train), ("val", val or {})):
        for name, content in ({"cat/good.png": buffer.getvalue(), "dog/good.png": buffer.getvalue()} | files).items():
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            (root / split / name).write_bytes(content)
    return open_source(f"imagefolder:{root}")


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def array_source(count=70, size=(8, 9)):
    def split(name, number):
        pixels = np.random.default_rng(number).integers(0, 256, (number, *size, 3), np.uint8)
        return ArraySplit(pixels, np.arange(number) % 2, name)

    return Source("npz:x.npz", ("a", "b"), split("x_train", count), split("x_test", 10))


def stored(path):
    """[(mode, height, width, bytes, label)] in order, read straight from the documented layout."""
    content = path.read_bytes()
    header = np.frombuffer(content, HEADER, 1)[0]
    samples = np.frombuffer(content, SAMPLE, header["num_samples"], HEADER.itemsize + 2 * FIELD.itemsize)
    sizes = {a["pointer"]: a["size"] for a in np.frombuffer(content, ALLOCATION, offset=int(header["table"]))}
    return [
        (i["mode"], i["height"], i["width"], content[i["pointer"] : i["pointer"] + sizes[i["pointer"]]], label)
        for i, label in zip(samples["image"], samples["label"], strict=True)
    ]


def pixels_of(sample):
    mode, height, width, data, _ = sample
    if mode == MODE_RAW:
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    return np.asarray(Image.open(io.BytesIO(data)))


GOOD = encoded(picture(), "JPEG")
