"""Pictures of any kind, prepared as evaluation prepares them."""

import io

import numpy as np
import pytest
import torch
from pictures import encoded, folder_source, picture
from PIL import Image
from small_runs import VIT, make_run
from torch.nn import functional as F

import varscale
from varscale.data.conversion import convert
from varscale.data.dataset import read_dataset_info
from varscale.data.images import EXIF_ORIENTATION
from varscale.data.inspection import open_contents
from varscale.encoder.description import Description
from varscale.encoder.preprocessing import Preprocessing
from varscale.evaluate import open_images
from varscale.evaluation.context import Context, Place

SIZES = [(40, 60), (33, 20), (16, 16), (10, 30), (17, 90)]  # larger and smaller than the views, upright and wide


def prepare(size=16, **changes):
    values = {"mean": (0.1, 0.5, 0.7), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear"} | changes
    return Preprocessing(
        Description(
            "resnet18", "cifar", size, None, **values, feature_dim=512, objective="varcon", step=1, data_digest="0"
        )
    )


def evaluated(config, info, directory, encoder):
    images = open_images(directory, info, info, config, workers=1)
    return Context(encoder, images, Place(torch.device("cpu"), batch_size=4)).val


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A data set of PNG files, which it stores raw, and of JPEG files, of many sizes; and these files in its order."""
    folder = tmp_path_factory.mktemp("photographs")
    files = {f"cat/{h}x{w}.{kind.lower()}": encoded(picture(h, w), kind) for h, w in SIZES for kind in ("PNG", "JPEG")}
    convert(folder_source(folder / "files", {}, files), folder / "data")
    names = (folder / "data" / "val.names.txt").read_text().split()
    return folder / "data", [folder / "files" / name for name in names]


@pytest.mark.parametrize("encoder", [("encoder.stem=cifar", "data.interpolation=bicubic"), VIT])
def test_features_are_those_that_evaluation_measures(tmp_path, photographs, encoder):
    directory, files = photographs
    info = read_dataset_info(directory)
    config, _ = make_run(tmp_path / "run", (directory, info.digest), "data.loader=torch", *encoder)
    loaded = varscale.load_encoder(tmp_path / "run")
    expected = evaluated(config, info, directory, loaded).features
    contents = open_contents(directory)
    assert {True, False} == set(contents.summaries["val"].is_jpeg.tolist())
    found = loaded(loaded.preprocess([Image.open(file) for file in files]))
    # PNG files to rounding in float32, JPEG files to what Pillow's and torchvision's decoder differ by.
    raw = ~torch.from_numpy(contents.summaries["val"].is_jpeg)
    torch.testing.assert_close(found[raw], expected[raw], rtol=1e-4, atol=1e-5)
    assert F.cosine_similarity(found, expected).min() > 0.9999
    others = F.cosine_similarity(found[raw], expected[raw].roll(1, 0))
    assert others.min() < 0.999


def test_ffcvs_decoder_makes_hardly_another_image(tmp_path, photographs):
    pytest.importorskip("ffcv")
    directory, files = photographs
    info = read_dataset_info(directory)
    config, _ = make_run(tmp_path / "run", (directory, info.digest))
    found = varscale.load_encoder(tmp_path / "run").preprocess([Image.open(file) for file in files])
    expected = evaluated(config, info, directory, lambda images: images.flatten(1)).features
    levels = (found.flatten(1) - expected).abs().mul(255 * min(info.std))
    raw = ~torch.from_numpy(open_contents(directory).summaries["val"].is_jpeg)
    assert levels[raw].max() < 1.01
    assert levels.mean() < 2


def test_every_way_to_give_the_same_images():
    arrays = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    expected = prepare()(list(arrays))
    assert expected.shape == (4, 3, 16, 16)
    tensors = torch.from_numpy(arrays)
    ways = {
        "array": arrays,
        "planes": np.ascontiguousarray(arrays.transpose(0, 3, 1, 2)),
        "tensor": tensors,
        "tensor of planes": tensors.permute(0, 3, 1, 2),
        "PIL": [Image.fromarray(array) for array in arrays],
        "mixed": [Image.fromarray(arrays[0]), arrays[1], tensors[2:]],
        "read-only": np.broadcast_to(arrays, arrays.shape),
        "backwards": np.ascontiguousarray(arrays[:, ::-1])[:, ::-1],
    }
    for way, images in ways.items():
        assert torch.equal(prepare()(images), expected), way
    assert torch.equal(prepare()(arrays[0]), expected[:1])
    assert torch.equal(prepare()(Image.fromarray(arrays[0])), expected[:1])


def test_where_both_ends_are_three_arrays_have_their_channels_last_and_tensors_first():
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    found = prepare(3, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    torch.testing.assert_close(found(cube)[0], torch.from_numpy(cube).permute(2, 0, 1).float())
    torch.testing.assert_close(found(torch.from_numpy(cube))[0], torch.from_numpy(cube).float())


def test_photographs_are_turned_upright_and_transparent_is_white():
    turned = picture(30, 20)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    file = encoded(turned.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert torch.equal(prepare()(Image.open(io.BytesIO(file))), prepare()(turned))
    assert torch.equal(prepare()(Image.new("RGBA", (16, 16))), prepare()(Image.new("RGB", (16, 16), "white")))
    assert torch.equal(prepare()(Image.new("L", (16, 16), 9)), prepare()(Image.new("RGB", (16, 16), (9, 9, 9))))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "there are no images"),
        (np.zeros((4, 4, 3)), TypeError, "found float64"),
        (torch.zeros(4, 4, 3), TypeError, r"found torch\.float32"),
        (np.zeros((4, 4), np.uint8), ValueError, r"found \(4, 4\)"),
        (np.zeros((2, 4, 4, 4), np.uint8), ValueError, r"found \(2, 4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"found \(0, 4, 3\)"),
        ("photo.jpg", TypeError, r"not str; open a file by PIL\.Image\.open"),
    ],
)
def test_what_is_no_image_is_refused(images, error, message):
    with pytest.raises(error, match=message):
        prepare()(images)
