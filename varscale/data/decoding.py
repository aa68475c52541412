"""The compiled path from bytes in a .beton to views: FFCV's decoder decodes each image once, then it is cut V times."""

import ctypes

import llvmlite.binding
import numpy as np
from numba import types

from varscale.data import libffcv
from varscale.data.compiled import compiled
from varscale.data.geometry import crop_geometry
from varscale.data.jpeg_header import frame_size
from varscale.data.randomness import stream
from varscale.data.records import DAMAGED, DECODED, FILE_TOO_SHORT, OTHER_SIZE
from varscale.data.resampling import resample

if libffcv.imdecode() is None:
    raise ImportError("FFCV's decoder is missing")  # a call of it would end the process

LARGEST_SHRINK = 8  # of a JPEG's blocks, while they are decoded
jpeg_size = compiled(frame_size)

# By name, not by address: code that holds an address could not be kept on disk.
llvmlite.binding.add_symbol("ffcv_imdecode", ctypes.cast(libffcv.imdecode(), ctypes.c_void_p).value)
_size, _flag = types.uint32, types.boolean
_decode_jpeg = types.ExternalFunction(
    "ffcv_imdecode",
    types.int32(types.uintp, types.uint64, _size, _size, types.uintp, *[_size] * 6, _flag, _flag),
)
_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))


@compiled
def decode_views(file, records, indices, first, count, views, seed, epoch, scratch, images):
    """Reads and decodes samples, each once, and cuts their views; touches no Python object, holds no lock.

    file: descriptor of the open .beton. records: (num_samples,) RECORD. indices: (n,) int64 samples, which are numbers
    `first` to `first` + n - 1 of a batch of `count`. views: (V,) VIEW. seed, epoch: uint64. scratch: uint8, as many as
    `scratch_bytes` says for any of the samples. images: uint8, the buffer of the batch's views (see VIEW), written.

    Returns (position, status): (-1, DECODED), or the first position in `indices` that failed and one of FAILURES.
    """
    for position in range(len(indices)):
        index = np.uint64(indices[position])
        record = records[indices[position]]
        shrink = _shrink(record, views, seed, epoch, index) if record.is_jpeg and len(views) else 1
        height, width = -(-record.height // shrink), -(-record.width // shrink)
        size = record.size if record.is_jpeg else 0
        image = scratch[size : size + height * width * 3].reshape(height, width, 3)
        status = _load(file, record, shrink, scratch[:size], image)
        if status != DECODED:
            return position, status
        for number in range(len(views)):
            view = views[number]
            key = stream(seed, epoch, index, np.uint64(number))
            rows, columns, flip = crop_geometry(record.height, record.width, view, key)
            start = view.before * count + view.stride * (first + position) + view.within
            destination = images[start : start + view.size * view.size * 3].reshape(view.size, view.size, 3)
            resample(image, _shrunk(rows, shrink), _shrunk(columns, shrink), flip, view.is_bicubic, destination)
    return -1, DECODED


@compiled
def _shrink(record, views, seed, epoch, index):
    """By how much the decoder may shrink an image: 2, 4 or 8 where every crop is larger than its view by as much."""
    room = LARGEST_SHRINK
    for number in range(len(views)):
        key = stream(seed, epoch, index, np.uint64(number))
        rows, columns, _ = crop_geometry(record.height, record.width, views[number], key)
        room = min(room, rows[1] // rows[2], columns[1] // columns[2])
    shrink = 1
    while shrink * 2 <= room:
        shrink *= 2
    return shrink


@compiled
def _shrunk(lines, shrink):
    start, length, resized, first = lines
    return start / shrink, length / shrink, resized, first


@compiled
def _load(file, record, shrink, jpeg, image):
    if not record.is_jpeg:
        return DECODED if _read_fully(file, record.offset, image.reshape(-1)) else FILE_TOO_SHORT
    if not _read_fully(file, record.offset, jpeg):
        return FILE_TOO_SHORT
    # TurboJPEG would scale a picture of another size to fit, and FFCV's imdecode would call that a success.
    if jpeg_size(jpeg) != (record.height, record.width):
        return OTHER_SIZE
    height, width = record.height, record.width
    # Warnings count as failures: they are how TurboJPEG tells of missing data, which it fills with grey.
    jpeg_at, image_at = jpeg.ctypes.data, image.ctypes.data
    status = _decode_jpeg(jpeg_at, jpeg.size, height, width, image_at, height, width, 0, 0, 1, shrink, False, False)
    return DECODED if status == 0 else DAMAGED


@compiled
def _read_fully(file, offset, destination):
    done = 0
    while done < destination.size:
        left = destination[done:]
        count = _pread(file, left.ctypes.data, left.size, offset + np.uint64(done))
        if count <= 0:
            return False
        done += count
    return True
