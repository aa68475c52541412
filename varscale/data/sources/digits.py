"""scikit-learn's handwritten digits, which need no download."""

import hashlib

import numpy as np
from PIL import Image

from varscale.data.sources.splits import ArraySplit, Source
from varscale.errors import UserError

DIGIT_SIZES = (32, 16)


def open_digits(size: int) -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, enlarged bicubically, a stratified fifth held out."""
    from sklearn.datasets import load_digits

    if size not in DIGIT_SIZES:
        raise UserError(f"--image-size {size}: the digits are made in sizes {' and '.join(map(str, DIGIT_SIZES))}")
    digits = load_digits()
    # 17 grey levels to 256, then Pillow's fixed-point resampling: the same bytes on every machine.
    levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    enlarged = [np.asarray(Image.fromarray(level).resize((size, size), Image.Resampling.BICUBIC)) for level in levels]
    images = np.repeat(np.stack(enlarged)[..., None], 3, axis=3)
    labels = digits.target.astype(np.int64)
    held_out = np.zeros(len(labels), bool)
    for digit in range(10):
        # A fixed random order that no library's next version can change.
        members = np.flatnonzero(labels == digit).tolist()
        members.sort(key=lambda index: hashlib.sha256(f"held-out digits {index}".encode()).digest())
        held_out[members[: round(len(members) / 5)]] = True
    train, val = (ArraySplit(images[chosen], labels[chosen], "digits") for chosen in (~held_out, held_out))
    return Source("digits", tuple(str(digit) for digit in range(10)), train, val, {"image_size": size})
