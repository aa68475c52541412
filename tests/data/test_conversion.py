"""A conversion stores every image as it should be seen, counts exactly, and writes all or nothing."""

import io
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from varscale.data import images, libffcv
from varscale.data.beton import ALLOCATION, FIELD, HEADER, MODE_JPEG, MODE_RAW, SAMPLE, check_beton
from varscale.data.conversion import UndecodableFiles, channel_statistics, convert, estimated_bytes
from varscale.data.dataset import read_dataset_info, sample_name
from varscale.data.images import ImageOptions
from varscale.data.sources import ArraySplit, Source, open_source
from varscale.errors import UserError

RNG = np.random.default_rng(0)
HAS_FFCV = libffcv.imdecode() is not None


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


# --- what is counted


def test_statistics_are_exact_and_cover_train_only(tmp_path):
    source = array_source()
    info = convert(source, tmp_path / "out").info
    values = source.train.images / 255
    np.testing.assert_allclose(info.mean, values.mean((0, 1, 2)), rtol=1e-13)
    np.testing.assert_allclose(info.std, values.std((0, 1, 2)), rtol=1e-13)
    assert info.counts == {"train": (35, 35), "val": (5, 5)}
    size = {"min_height": 8, "max_height": 8, "min_width": 9, "max_width": 9}
    assert info.image_sizes == {"train": size, "val": size}
    assert read_dataset_info(tmp_path / "out") == info


def test_statistics_of_jpegs_are_those_of_the_decoded_pixels(tmp_path):
    noise = Image.fromarray(RNG.integers(0, 256, (90, 120, 3), np.uint8))
    source = folder_source(
        tmp_path / "in", {"cat/a.jpg": encoded(noise, "JPEG"), "dog/b.jpg": encoded(picture(), "JPEG")}
    )
    info = convert(source, tmp_path / "out").info
    values = np.concatenate([pixels_of(s).reshape(-1, 3) for s in stored(tmp_path / "out" / "train.beton")]) / 255
    # FFCV's decoder uses a faster transform than Pillow's, which darkens red and blue by about one level of 255.
    np.testing.assert_allclose(info.mean, values.mean(0), atol=1.5 / 255)
    np.testing.assert_allclose(info.std, values.std(0), atol=1.5 / 255)


def test_channel_statistics_of_huge_counts_do_not_overflow():
    histogram = np.zeros((3, 256), np.int64)
    histogram[:, 0] = histogram[:, 255] = 2**60
    assert channel_statistics(histogram) == ((0.5,) * 3, (0.5,) * 3)


def test_bytes_do_not_depend_on_the_workers(tmp_path):
    files = {f"{'cat' if i % 2 else 'dog'}/{i}.jpg": encoded(picture(20 + i, 30), "JPEG") for i in range(80)}
    files["cat/zz.jpg"] = encoded(picture(30, 30, 1), "JPEG")
    # The arrays make more tasks than may wait at a time, so that finished ones are written in between.
    for source in (folder_source(tmp_path / "in", files), array_source(500)):
        for workers in (1, 2, 3):
            convert(source, tmp_path / str(workers), workers=workers, overwrite=True)
        _same_bytes(tmp_path)


def _same_bytes(tmp_path):
    for name in ("train.beton", "val.beton", "dataset.json"):
        first = (tmp_path / "1" / name).read_bytes()
        assert first == (tmp_path / "2" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_digest_tells_contents_apart(tmp_path):
    source = array_source()
    labels = source.train.labels.copy()
    labels[:2] = labels[1::-1]
    relabelled = replace(source, train=replace(source.train, labels=labels))
    changed = replace(source, val=replace(source.val, images=source.val.images ^ np.uint8(1)))
    digests = [convert(s, tmp_path / str(i)).info.digest for i, s in enumerate([source, source, relabelled, changed])]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_loader_reads_what_was_written(tmp_path, os_cache):
    ffcv_loader = pytest.importorskip("ffcv.loader")
    fields = pytest.importorskip("ffcv.fields.rgb_image")
    basics = pytest.importorskip("ffcv.fields.basics")
    # The second and third are larger than the smallest page.
    noise = [Image.fromarray(RNG.integers(0, 256, (side, 900, 3), np.uint8)) for side in (300, 800, 1600, 310)]
    jpegs = {f"cat/{i}.jpg": encoded(picture(200 + i, 100), "JPEG") for i in range(9)}
    sources = {
        "array": array_source(),
        "png": folder_source(
            tmp_path / "png", {f"dog/{i}.png": encoded(image, "PNG") for i, image in enumerate(noise)}
        ),
        "jpeg": folder_source(tmp_path / "jpeg", jpegs),
    }
    for name, source in sources.items():
        beton = convert(source, tmp_path / f"{name}-out").directory / "train.beton"
        decoder = fields.SimpleRGBImageDecoder() if name == "array" else fields.CenterCropRGBImageDecoder((80, 80), 1.0)
        pipelines = {"image": [decoder], "label": [basics.IntDecoder()]}
        loader = ffcv_loader.Loader(
            str(beton), batch_size=4, num_workers=1, os_cache=os_cache, drop_last=False, pipelines=pipelines
        )
        found = [(image.copy(), int(label[0])) for batch in loader for image, label in zip(*batch, strict=True)]
        expected = stored(beton)
        assert [label for _, label in found] == [sample[4] for sample in expected]
        for (image, _), sample in zip(found, expected, strict=True):
            wanted = pixels_of(sample) if name == "array" else square(pixels_of(sample), 80)
            difference = np.abs(np.asarray(image).astype(int) - wanted)
            if name == "array":
                assert difference.max() == 0
            elif sample[0] == MODE_RAW:
                assert difference.max() <= 1  # two versions of OpenCV round differently
            else:  # FFCV's JPEG decoder uses a faster, coarser transform than Pillow's
                assert difference.mean() < 1.5
                assert np.quantile(difference, 0.99) <= 4


def square(pixels, size):
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    cropped = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    cv2 = pytest.importorskip("cv2")
    return cv2.resize(cropped, (size, size), interpolation=cv2.INTER_AREA)


# --- bad images

GOOD = encoded(picture(), "JPEG")
BAD = {
    "truncated": (GOOD[: len(GOOD) // 2], "truncated"),
    "empty": (b"", "the file is empty"),
    "text": (b"hello", "not a JPEG or PNG"),
    "gif": (encoded(picture(), "GIF"), "not a JPEG or PNG"),
    "header": (GOOD[:20], ""),
    "png": (encoded(picture(), "PNG")[:200], ""),
}


@pytest.mark.parametrize("workers", [1, 2])
def test_undecodable_files_are_all_named_and_nothing_is_left(tmp_path, workers):
    train = {f"cat/{name}.jpg": content for name, (content, _) in BAD.items()} | {"dog/fine.jpg": GOOD}
    source = folder_source(tmp_path / "in", train, {"dog/void.png": b""})
    with pytest.raises(UndecodableFiles, match=r"7 of 12 images cannot be decoded.*--skip-bad") as caught:
        convert(source, tmp_path / "new" / "out", workers=workers)
    assert len(caught.value.reports) == 7
    for name, (_, reason) in BAD.items():
        (report,) = [r for r in caught.value.reports if r.startswith(f"train/cat/{name}.jpg: ")]
        assert reason in report
        assert "\n" not in report
    assert sorted(os.listdir(tmp_path)) == ["in"]


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
    assert os.listdir(tmp_path) == ["in"]


def test_a_file_that_vanishes_is_no_bad_image(tmp_path):
    source = folder_source(tmp_path / "in", {"cat/gone.jpg": GOOD})
    (tmp_path / "in" / "train" / "cat" / "gone.jpg").unlink()
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"cannot read .*cat/gone\.jpg: No such file"):
            convert(source, tmp_path / "out", skip_bad=True, workers=workers)
    assert os.listdir(tmp_path) == ["in"]


# --- the samples' names


def test_names_follow_the_samples_without_those_left_out(tmp_path):
    odd = os.fsdecode(b"dog/line\nbreak \xff.png")
    train = {"cat/a.jpg": GOOD, "cat/b.jpg": b"?", odd: encoded(picture(20, 10), "PNG")}
    out = convert(folder_source(tmp_path / "in", train), tmp_path / "out", skip_bad=True).directory
    expected = ["train/cat/a.jpg", "train/cat/good.png", "train/dog/good.png", f"train/{odd}".replace("\n", "\\n")]
    assert [sample_name(out, "train", index) for index in range(4)] == expected
    assert stored(out / "train.beton")[3][1:3] == (20, 10)
    assert sample_name(out, "train", 4) is None


def test_array_samples_are_named_by_their_place(tmp_path):
    out = convert(array_source(), tmp_path / "out").directory
    assert sample_name(out, "train", 17) == "x_train[17]"
    assert sample_name(out, "val", 0) == "x_test[0]"


def test_a_data_set_without_names_is_read_and_replaced_as_before(tmp_path):
    out = convert(array_source(), tmp_path / "out").directory
    for split in ("train", "val"):
        (out / f"{split}.names.txt").unlink()
    assert sample_name(out, "train", 0) is None
    assert read_dataset_info(out).num_samples("train") == 70
    convert(array_source(20), out, overwrite=True)
    assert sample_name(out, "train", 0) == "x_train[0]"


# --- the folder that is made


def test_an_empty_folder_is_filled_and_a_data_set_is_replaced_only_if_asked(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert(array_source(20), out)
    with pytest.raises(UserError, match="already holds a data set: pass --overwrite"):
        convert(array_source(30), out)
    assert read_dataset_info(out).num_samples("train") == 20
    (out / "skipped.txt").write_text("from before")
    convert(array_source(30), out, overwrite=True)
    assert read_dataset_info(out).num_samples("train") == 30
    assert sorted(os.listdir(out)) == [
        "dataset.json",
        "train.beton",
        "train.names.txt",
        "val.beton",
        "val.names.txt",
    ]
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_overwrite_keeps_the_old_data_set(tmp_path):
    convert(array_source(20), tmp_path / "out")
    source = folder_source(tmp_path / "in", {"cat/bad.jpg": b"?"})
    with pytest.raises(UndecodableFiles):
        convert(source, tmp_path / "out", overwrite=True)
    assert read_dataset_info(tmp_path / "out").num_samples("train") == 20
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


@pytest.mark.parametrize("beside_a_data_set", [True, False])
def test_other_peoples_files_are_never_replaced(tmp_path, beside_a_data_set):
    out = tmp_path / "out"
    if beside_a_data_set:
        convert(array_source(20), out)
    out.mkdir(exist_ok=True)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files \(thesis\.tex\)"):
        convert(array_source(20), out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_a_file_or_a_lone_dataset_json_is_not_replaced(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file"):
        convert(array_source(20), tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match=r"out cannot be made: .*file is a file"):
        convert(array_source(20), tmp_path / "file" / "out")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="holds other files"):
        convert(array_source(20), tmp_path / "dir", overwrite=True)


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(array_source(20), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert read_dataset_info(tmp_path / "real").num_samples("train") == 20


def test_no_permission(tmp_path, unprivileged):
    with tempfile.TemporaryDirectory() as folder:
        closed, source = Path(folder), folder_source(Path(folder) / "in", {})
        (closed / "in" / "train" / "cat" / "good.png").chmod(0)
        closed.chmod(0o755 if os.geteuid() == 0 else 0o555)
        with unprivileged():
            with pytest.raises(UserError, match=r"cannot read .*train/cat/good\.png: Permission denied"):
                convert(source, Path("/tmp") / f"varscale-test-{os.getpid()}")
            for out in (closed / "out", closed / "new" / "out"):
                with pytest.raises(UserError, match=f"out: no permission to write in {closed}$"):
                    convert(array_source(), out)
        closed.chmod(0o755)
        assert os.listdir(closed) == ["in"]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 6 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(mount)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root and its permission to mount")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_too_little_space_is_seen_before_the_work(small_disk):
    source = array_source(200, (128, 128))
    with pytest.raises(UserError, match=r"not enough disk space: about 0\.01 GB are needed, 0\.01 GB are free"):
        convert(source, small_disk / "out")
    assert os.listdir(small_disk) == []


def test_a_mount_point_is_refused(small_disk):
    with pytest.raises(UserError, match="is a mount point"):
        convert(array_source(), small_disk)


def test_a_disk_that_fills_up_leaves_nothing(small_disk, tmp_path):
    files = {f"cat/{i:04}.jpg": GOOD for i in range(200)}
    files |= {f"cat/{i:04}.jpg": encoded(picture(), "JPEG") + RNG.bytes(2_000_000) for i in (1, 2, 5, 7)}
    source = folder_source(tmp_path / "in", files)
    assert estimated_bytes(source, ImageOptions()) < 6e6  # the large ones are not among those that are probed
    with pytest.raises(UserError, match=r"out: the disk is full .No space left on device.*nothing was kept"):
        convert(source, small_disk / "out")
    assert os.listdir(small_disk) == []


def test_a_limit_on_file_sizes_leaves_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from varscale.data.conversion import convert\n"
        "from varscale.data.sources import open_source\n"
        "convert(open_source('digits'), Path(sys.argv[1]))"
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))

    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert "UserError" in result.stderr
    assert "the disk is full (File too large" in result.stderr
    assert os.listdir(tmp_path) == []
