"""A conversion counts exactly, names every sample, and writes what FFCV reads."""

import os
from dataclasses import replace

import numpy as np
import pytest
from pictures import GOOD, array_source, encoded, folder_source, picture, pixels_of, stored
from PIL import Image

from varscale.data.beton import MODE_RAW
from varscale.data.conversion import channel_statistics, convert
from varscale.data.dataset import read_dataset_info
from varscale.data.names import sample_name

RNG = np.random.default_rng(0)


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


# --- the samples' names


def test_names_follow_the_samples_without_those_left_out(tmp_path):
    odd = os.fsdecode(b"dog/line\nbreak \xff.png")
    train = {"cat/a.jpg": GOOD, "cat/b.jpg": b"?", odd: encoded(picture(20, 10), "PNG")}
    out = convert(folder_source(tmp_path / "in", train), tmp_path / "out", skip_bad=True).directory
    expected = ["train/cat/a.jpg", "train/cat/good.png", "train/dog/good.png", r"train/dog/line\nbreak \xff.png"]
    assert [sample_name(out, "train", index) for index in range(4)] == expected
    assert stored(out / "train.beton")[3][1:3] == (20, 10)
    assert sample_name(out, "train", 4) is None
    assert b"\xff.png\n" in (out / "train.names.txt").read_bytes()


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
