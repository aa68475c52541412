"""Every image is stored as it should be seen, and those that cannot be decoded are named or left out."""

import io
import os

import numpy as np
import pytest
from pictures import GOOD, array_source, encoded, folder_source, picture, pixels_of, stored
from PIL import Image, ImageOps

from varscale.data import images, libffcv
from varscale.data.beton import MODE_JPEG, MODE_RAW, check_beton
from varscale.data.conversion import UndecodableFiles, convert
from varscale.data.decoders import installed_decoder
from varscale.data.geometry import CropSpec
from varscale.data.images import ImageOptions
from varscale.data.loader import ViewLoader
from varscale.errors import UserError

HAS_FFCV = libffcv.imdecode() is not None


def convert_one(tmp_path, name, content, **options):
    """The stored form of one image file of the class cat, beside the good images."""
    source = folder_source(tmp_path / "in", {f"cat/{name}": content})
    conversion = convert(source, tmp_path / "out", image_options=ImageOptions(**options))
    index = source.train.files.index(f"train/cat/{name}")
    return stored(tmp_path / "out" / "train.beton")[index], conversion


# --- how images are stored


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30, "comment": "hello"}]
)
def test_jpeg_is_kept_byte_for_byte(tmp_path, options):
    content = encoded(picture(), "JPEG", **options)
    sample, conversion = convert_one(tmp_path, "a.JPG", content, max_resolution=60, jpeg_quality=50)
    assert sample[:3] == (MODE_JPEG, 40, 60)
    assert sample[3] == content
    assert conversion.storage == {"kept": 1, "raw": 4}


def test_png_and_arrays_stay_lossless(tmp_path):
    sample, _ = convert_one(tmp_path, "a.png", encoded(picture(200, 300), "PNG"))
    assert sample[0] == MODE_RAW
    np.testing.assert_array_equal(pixels_of(sample), np.asarray(picture(200, 300)))
    source = array_source()
    convert(source, tmp_path / "arrays")
    for index, array_sample in enumerate(stored(tmp_path / "arrays" / "train.beton")):
        np.testing.assert_array_equal(pixels_of(array_sample), source.train.images[index])
        assert array_sample[4] == source.train.labels[index]


def test_jpeg_quality_turns_large_lossless_images_into_jpeg(tmp_path):
    large, conversion = convert_one(tmp_path, "a.png", encoded(picture(200, 300), "PNG"), jpeg_quality=90)
    assert large[0] == MODE_JPEG
    assert np.abs(pixels_of(large).astype(int) - np.asarray(picture(200, 300))).mean() < 2
    assert conversion.storage == {"jpeg": 1, "raw": 4}  # the others are 60x40
    coarse, _ = convert_one(tmp_path / "coarse", "a.png", encoded(picture(200, 300), "PNG"), jpeg_quality=20)
    assert len(coarse[3]) < 0.7 * len(large[3])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_rotated_images_become_upright(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(), kind, exif=exif.tobytes())
    sample, _ = convert_one(tmp_path, f"a.{kind.lower()}", content)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert pixels_of(sample).shape == expected.shape == ((60, 40, 3) if orientation > 4 else (40, 60, 3))
    assert np.abs(pixels_of(sample).astype(int) - expected).mean() < 3
    assert b"Exif" not in sample[3]


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_upright_and_senseless_orientations_are_kept(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(), "JPEG", exif=exif.tobytes())
    assert convert_one(tmp_path, "a.jpeg", content)[0][3] == content


def test_damaged_exif_does_not_cost_the_image(tmp_path):
    content = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff" + bytes(20))
    assert convert_one(tmp_path, "a.jpeg", content)[0][3] == content


@pytest.mark.parametrize(("mode", "kind"), [("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("1", "PNG")])
def test_other_colour_models_become_rgb(tmp_path, mode, kind):
    content = encoded(picture().convert(mode), kind)
    sample, _ = convert_one(tmp_path, "a." + kind.lower(), content)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    found = pixels_of(sample)
    assert found.shape == (40, 60, 3)
    assert sample[0] == (MODE_JPEG if kind == "JPEG" else MODE_RAW)
    assert np.abs(found.astype(int) - expected).mean() <= (3 if kind == "JPEG" else 0)


def test_sixteen_bit_grey_is_scaled_and_transparency_is_white(tmp_path):
    deep = (np.arange(40 * 60).reshape(40, 60) * 27).astype(np.uint16)
    sample, _ = convert_one(tmp_path / "deep", "a.png", encoded(Image.fromarray(deep), "PNG"))
    np.testing.assert_array_equal(pixels_of(sample), np.repeat((deep >> 8)[..., None], 3, 2))
    clear = picture().convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(60) < 30, 0, 255).astype(np.uint8)[None].repeat(40, 0)))
    found = pixels_of(convert_one(tmp_path / "clear", "a.png", encoded(clear, "PNG"))[0])
    assert (found[:, :30] == 255).all()
    np.testing.assert_array_equal(found[:, 30:], np.asarray(picture())[:, 30:])


@pytest.mark.parametrize(("size", "expected"), [((300, 200), (48, 32)), ((200, 301), (32, 48)), ((400, 3), (48, 1))])
def test_max_resolution_shrinks_the_longer_side(tmp_path, size, expected):
    sample, conversion = convert_one(tmp_path, "a.jpg", encoded(picture(*size), "JPEG"), max_resolution=48)
    assert sample[:3] == (MODE_JPEG, *expected)
    assert conversion.info.image_sizes["train"]["max_height"] <= 48
    assert conversion.info.options["max_resolution"] == 48
    if min(size) > 100:
        small = np.asarray(picture(*size).resize(expected[::-1], Image.Resampling.BOX)).astype(int)
        assert np.abs(pixels_of(sample) - small).mean() < 4


@pytest.mark.skipif(not HAS_FFCV, reason="needs FFCV's decoder: pip install ffcv")
def test_a_jpeg_that_is_kept_can_be_loaded(tmp_path):
    odd = GOOD[:2] + b"\xff\xd3" + GOOD[2:]  # a marker that stands alone, which every decoder passes over
    conversion = convert(folder_source(tmp_path / "in", {"cat/a.jpg": odd}), tmp_path / "out")
    assert conversion.storage == {"kept": 1, "raw": 4}
    options = {"seed": 0, "workers": 1, "decoder": installed_decoder()}
    with ViewLoader(tmp_path / "out" / "train.beton", [CropSpec(16, None)], **options) as loader:
        assert sum(len(batch.indices) for batch in loader.batches(np.arange(3)[None], epoch=0)) == 3


def test_a_damaged_jpeg_that_pillow_overlooks_is_mended_and_named(tmp_path):
    scan = GOOD.index(b"\xff\xda") + 20
    for position in range(scan, len(GOOD) - 2):
        content = bytearray(GOOD)
        content[position] ^= 0x55
        seen = np.asarray(Image.open(io.BytesIO(content)))
        if images._decode_as_loader(bytes(content), Image.open(io.BytesIO(content))) is None:
            break
    else:
        pytest.fail("FFCV's decoder accepts every damage")
    sample, conversion = convert_one(tmp_path, "a.jpg", bytes(content))
    assert conversion.storage == {"mended": 1, "raw": 4}
    assert conversion.mended == ["train/cat/a.jpg"]
    assert np.abs(pixels_of(sample).astype(int) - seen).mean() < 6
    assert images._decode_as_loader(sample[3], Image.open(io.BytesIO(sample[3]))) is not None


def test_a_png_named_jpeg_is_read_by_its_contents(tmp_path):
    sample, _ = convert_one(tmp_path, "a.JPEG", encoded(picture(), "PNG"))
    np.testing.assert_array_equal(pixels_of(sample), np.asarray(picture()))


# --- bad images

BAD = {
    "truncated": (GOOD[: len(GOOD) // 2], "truncated"),
    "empty": (b"", "the file is empty"),
    "text": (b"hello", "not a JPEG or PNG"),
    "gif": (encoded(picture(), "GIF"), "not a JPEG or PNG"),
    "header": (GOOD[:20], ""),
    "png": (encoded(picture(), "PNG")[:200], ""),
}


@pytest.mark.parametrize("workers", [1, 2])
def test_undecodable_files_are_all_named(tmp_path, workers):
    train = {f"cat/{name}.jpg": content for name, (content, _) in BAD.items()} | {"dog/fine.jpg": GOOD}
    source = folder_source(tmp_path / "in", train, {"dog/void.png": b""})
    with pytest.raises(UndecodableFiles, match=r"7 of 12 images cannot be decoded.*--skip-bad") as caught:
        convert(source, tmp_path / "new" / "out", workers=workers)
    assert len(caught.value.reports) == 7
    for name, (_, reason) in BAD.items():
        (report,) = [r for r in caught.value.reports if r.startswith(f"train/cat/{name}.jpg: ")]
        assert reason in report
        assert "\n" not in report
    assert os.listdir(tmp_path / "new") == [".out.partial"]


def test_skip_bad_leaves_them_out_and_names_them(tmp_path):
    train = {f"cat/{name}.jpg": content for name, (content, _) in BAD.items()} | {"dog/fine.jpg": GOOD}
    conversion = convert(folder_source(tmp_path / "in", train), tmp_path / "out", skip_bad=True)
    assert conversion.info.skipped == 6
    assert conversion.info.counts == {"train": (1, 2), "val": (1, 1)}
    lines = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert len(lines) == 6
    assert lines[0] == "train/cat/empty.jpg: the file is empty"
    labels = check_beton(tmp_path / "out" / "train.beton", num_classes=2, require_labels=True).labels
    np.testing.assert_array_equal(labels, [0, 1, 1])
    assert "skipped.txt" not in os.listdir(convert(array_source(), tmp_path / "whole").directory)


def test_a_class_of_bad_images_only_is_an_error_even_when_skipping(tmp_path):
    source = folder_source(tmp_path / "in", {"cow/a.jpg": b"moo"}, {"cow/a.jpg": GOOD})
    with pytest.raises(UserError, match="none of the images of class 'cow' in train can be decoded"):
        convert(source, tmp_path / "out", skip_bad=True)
    assert not (tmp_path / "out").exists()


def test_a_file_that_vanishes_is_no_bad_image(tmp_path):
    source = folder_source(tmp_path / "in", {"cat/gone.jpg": GOOD})
    (tmp_path / "in" / "train" / "cat" / "gone.jpg").unlink()
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"cannot read .*cat/gone\.jpg: No such file"):
            convert(source, tmp_path / "out", skip_bad=True, workers=workers)
    assert os.listdir(tmp_path) == ["in"]
