"""Crops: their distribution against torchvision's, their pixels against torchvision's on the same decoded image."""

import io
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest, chisquare, ks_2samp, kstest
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from varscale.data.decoding import jpeg_size
from varscale.data.geometry import CropSpec, crop_geometry, view_table
from varscale.data.jpeg_header import frame_size
from varscale.data.randomness import as_uint64, stream

SEED, EPOCH = as_uint64(3)[0], as_uint64(9)[0]


@numba.njit
def geometries(height, width, view, seed, epoch, number, count):
    boxes = np.empty((count, 5), np.int64)
    for sample in range(count):
        key = stream(seed, epoch, np.uint64(sample), np.uint64(number))
        rows, columns, flip = crop_geometry(height, width, view, key)
        boxes[sample] = np.array([rows[0], columns[0], rows[1], columns[1], np.int64(flip)])
    return boxes


def our_boxes(height, width, spec, count, number=0):
    """(count, 5): top, left, height, width, flip."""
    return geometries(height, width, view_table([spec])[0], SEED, EPOCH, number, count)


def torchvision_boxes(height, width, spec, count):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    return np.array([RandomResizedCrop.get_params(image, spec.scale, spec.ratio) for _ in range(count)])


def slack_share(boxes, height, width):
    """Where the box stands in the room that it has, for boxes with room: uniform on [0, 1] but for pixels."""
    room = np.stack([height - boxes[:, 2], width - boxes[:, 3]], 1)
    wide = (room > 20).all(1)
    return (boxes[wide, :2] + 0.5) / (room[wide] + 1)


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.05, 0.14)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 150)])
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    spec, count = CropSpec(224, scale), 4000
    ours, theirs = our_boxes(height, width, spec, count), torchvision_boxes(height, width, spec, count)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:4] <= (height, width)).all()
    assert ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3
    assert ks_2samp(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]).pvalue > 1e-3
    for axis in (0, 1):
        assert ks_2samp(ours[:, axis], theirs[:, axis]).pvalue > 1e-3
        assert kstest(slack_share(ours, height, width)[:, axis], "uniform").pvalue > 1e-3


def test_every_position_is_equally_likely():
    boxes = our_boxes(3, 4, CropSpec(32, (0.33, 0.34), ratio=(1.0, 1.0)), 6000)
    assert (boxes[:, 2:4] == 2).all()
    values, counts = np.unique(boxes[:, 0] * 10 + boxes[:, 1], return_counts=True)
    assert values.tolist() == [0, 1, 2, 10, 11, 12]
    assert chisquare(counts).pvalue > 1e-3


def test_flips_follow_their_probability_and_nothing_else():
    for probability in (0.0, 0.3, 1.0):
        boxes = our_boxes(64, 64, CropSpec(32, (0.2, 1.0), flip=probability), 4000)
        assert binomtest(int(boxes[:, 4].sum()), 4000, probability).pvalue > 1e-3
        if probability == 0.3:
            assert abs(np.corrcoef(boxes[:, 4], boxes[:, 0])[0, 1]) < 0.06


def test_views_of_an_image_are_independent():
    first, second = (our_boxes(375, 500, CropSpec(224, (0.2, 1.0)), 4000, number) for number in (0, 1))
    for value in range(5):
        assert abs(np.corrcoef(first[:, value], second[:, value])[0, 1]) < 0.06


@pytest.mark.parametrize(("height", "width"), [(10, 200), (200, 10), (1, 1), (1, 9)])
def test_impossible_ratios_fall_back_to_the_central_crop(height, width):
    spec = CropSpec(32, (0.9, 1.0))
    boxes = our_boxes(height, width, spec, 20)
    np.testing.assert_array_equal(boxes[:, :4], torchvision_boxes(height, width, spec, 20))


@numba.njit
def evaluation_geometry(height, width, view):
    return crop_geometry(height, width, view, np.uint64(0))


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (256, 256), (225, 1000)])
def test_evaluation_crop_is_resize_and_center_crop(height, width):
    rows, columns, flip = evaluation_geometry(height, width, view_table([CropSpec(224, None, flip=1.0)])[0])
    resized = F.resize(torch.zeros(1, height, width, dtype=torch.uint8), [256]).shape[-2:]
    numbered = torch.arange(resized[0])[:, None] * 10_000 + torch.arange(resized[1])
    corner = F.center_crop(numbered[None], [224, 224])[0, 0, 0].item()
    assert (rows[:2], columns[:2], flip) == ((0, height), (0, width), False)
    assert (rows[2], columns[2]) == tuple(resized)
    assert (rows[3], columns[3]) == divmod(corner, 10_000)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 40), (20, 30)])
def test_evaluation_crop_of_a_small_image_keeps_its_shorter_side(height, width):
    rows, columns, _ = evaluation_geometry(height, width, view_table([CropSpec(32, None)])[0])
    assert min(rows[2], columns[2]) == 32
    assert min(rows[3], columns[3]) == 0
    assert columns[2] == 32 * width // height


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_size_reads_the_frame_header(progressive):
    buffer = io.BytesIO()
    image = Image.fromarray(np.zeros((300, 517, 3), np.uint8))
    image.save(buffer, "JPEG", progressive=progressive, exif=b"Exif\0\0" + bytes(4000), comment=b"\xff\xc0 no frame")
    jpeg = np.frombuffer(buffer.getvalue(), np.uint8)
    assert jpeg_size(jpeg) == (300, 517)
    for length in range(0, 40, 3):
        assert jpeg_size(jpeg[:length]) == (0, 0)
    # Markers that stand alone, and fill bytes, which Pillow and TurboJPEG pass over.
    odd = np.concatenate([jpeg[:2], np.frombuffer(b"\xff\x01\xff\xd3\xff\xff\xff", np.uint8), jpeg[2:]])
    assert jpeg_size(odd) == frame_size(odd.tobytes()) == (300, 517)


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 0, "scale": None},
        {"size": 32, "scale": (0.0, 1.0)},
        {"size": 32, "scale": (0.5, 1.1)},
        {"size": 32, "scale": None, "ratio": (2.0, 1.0)},
        {"size": 32, "scale": None, "flip": 1.5},
        {"size": 32, "scale": None, "interpolation": "nearest"},
    ],
)
def test_senseless_crops_are_refused(arguments):
    with pytest.raises(ValueError):
        CropSpec(**arguments)


def test_machine_code_is_kept_between_processes():
    code = (
        "import numpy as np\n"
        "from varscale.data.decoding import decode_views\n"
        "from varscale.data.geometry import VIEW\n"
        "from varscale.data.records import RECORD\n"
        "no, seed = np.empty(0, np.int64), np.uint64(0)\n"
        "records, views, images = np.zeros(0, RECORD), np.zeros(1, VIEW), np.empty(0, np.uint8)\n"
        "decode_views(-1, records, no, 0, 0, views, seed, seed, images, images)\n"
        "print(sum(decode_views.stats.cache_hits.values()))\n"
    )
    hits = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)]
    assert hits[1] == "1\n"
