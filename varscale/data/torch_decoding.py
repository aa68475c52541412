"""`decode_views` by torchvision, for machines without FFCV, and as the compiled path's reference.

The same crops and flips. The pixels differ by what two JPEG decoders differ: FFCV's takes the fast inverse transform
(by at most 24 of 255 levels in the tests, by less than 1.5 on average), and shrinks images that are much larger than
their views while it decodes them (less than 2.5 on average). torchvision overlooks damage that leaves a JPEG without an
end, and gives what libjpeg makes of it, grey where there are no data; FFCV's decoder refuses it. So with
`data.on_bad_sample=skip` the two may pass over different samples. `convert_dataset.py verify` finds all changed bytes.
"""

import os

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from varscale.data.geometry import crop_geometry
from varscale.data.randomness import as_uint64, stream
from varscale.data.records import DAMAGED, DECODED, FILE_TOO_SHORT, OTHER_SIZE

INTERPOLATION = {False: F.InterpolationMode.BILINEAR, True: F.InterpolationMode.BICUBIC}


def decode_views(
    file: int,
    records: np.ndarray,
    indices: np.ndarray,
    first: int,
    count: int,
    views: np.ndarray,
    seed: np.uint64,
    epoch: np.uint64,
    _: np.ndarray,
    images: np.ndarray,
) -> tuple[int, int]:
    """As `varscale.data.decoding.decode_views`."""
    for position, index in enumerate(indices):
        image = _load(file, records[index])
        if isinstance(image, int):
            return position, image
        for number, view in enumerate(views):
            key = stream(as_uint64(int(seed)), as_uint64(int(epoch)), as_uint64(int(index)), as_uint64(number))[0]
            rows, columns, flip = crop_geometry(*image.shape[1:], view, key)
            start = view["before"] * count + view["stride"] * (first + position) + view["within"]
            size = int(view["size"])
            destination = images[start : start + size * size * 3].reshape(size, size, 3)
            cut = cut_view(image, rows, columns, size, flip=flip, bicubic=bool(view["is_bicubic"]))
            destination[:] = cut.permute(1, 2, 0).numpy()
    return -1, DECODED


def cut_view(
    image: torch.Tensor, rows: tuple, columns: tuple, size: int, *, flip: bool = False, bicubic: bool = False
) -> torch.Tensor:
    """One view, (3, size, size) uint8; rows and columns as `varscale.data.resampling.resample` takes them."""
    box = image[:, rows[0] : rows[0] + rows[1], columns[0] : columns[0] + columns[1]]
    resized = F.resize(box, [rows[2], columns[2]], INTERPOLATION[bicubic], antialias=True)
    cut = resized[:, rows[3] : rows[3] + size, columns[3] : columns[3] + size]
    return cut.flip(2) if flip else cut


def _load(file: int, record: np.void) -> torch.Tensor | int:
    """The image, (3, height, width) uint8, or why there is none."""
    data = os.pread(file, int(record["size"]), int(record["offset"]))
    if len(data) < record["size"]:
        return FILE_TOO_SHORT
    pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    height, width = int(record["height"]), int(record["width"])
    if not record["is_jpeg"]:
        return pixels.view(height, width, 3).permute(2, 0, 1)
    try:
        image = decode_jpeg(pixels, mode=ImageReadMode.RGB)
    except RuntimeError:
        return DAMAGED
    return image if image.shape == (3, height, width) else OTHER_SIZE
