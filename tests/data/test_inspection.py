"""An inspection tells what a data set holds, and draws the views that training would see."""

import re

import numpy as np
import pytest
import torch
from betons import load
from pictures import GOOD, encoded, folder_source, picture, pixels_of, stored

from varscale.config.schema import DataConfig
from varscale.data.contact_sheet import contact_sheet, spread, stored_image, views_of
from varscale.data.conversion import convert
from varscale.data.dataset import read_dataset_info
from varscale.data.geometry import CropSpec, training_crops
from varscale.data.inspection import describe, open_contents
from varscale.data.loader import ViewLoader
from varscale.errors import UserError


@pytest.fixture
def directory(tmp_path):
    files = {f"cat/{i}.jpg": encoded(picture(40 + i, 60), "JPEG") for i in range(6)} | {"dog/größe.jpg": GOOD}
    return convert(folder_source(tmp_path / "in", files), tmp_path / "out").directory


def test_what_is_in_a_data_set_is_told(directory):
    lines = describe(open_contents(directory)).splitlines()
    assert "classes  2: cat, dog" in lines
    assert "train    9 images, 2-7 a class, 60 x 40-45 pixels, 7 JPEG, 2 raw, 0.0 MB" in lines
    assert f"digest   {read_dataset_info(directory).digest}" in lines
    samples = [line for line in lines if line.startswith("train    ")][1:]
    assert len(samples) == 5
    assert re.fullmatch(r"train    0  label 0  cat  60 x 40  JPEG  [\d,]+ bytes  train/cat/0\.jpg", samples[0])
    assert len({line.index("train/cat/") for line in samples}) == 1  # aligned


def test_a_lone_beton_is_told_without_what_is_not_known(directory, tmp_path):
    lone = tmp_path / "lone.beton"
    lone.write_bytes((directory / "train.beton").read_bytes())
    text = describe(open_contents(lone))
    assert text.startswith("lone  9 images, 2-7 a class, ")
    assert "digest" not in text
    assert "cat" not in text
    assert "cat" in describe(open_contents(directory / "train.beton"))
    assert "val" not in describe(open_contents(directory / "train.beton")).replace("val.beton", "")
    with pytest.raises(UserError, match="holds no converted data set"):
        open_contents(tmp_path)


@pytest.mark.parametrize("name", ["out", "out/train.beton", "lone.beton"])
def test_views_are_those_of_training_without_normalisation(directory, tmp_path, name):
    (tmp_path / "lone.beton").write_bytes((directory / "train.beton").read_bytes())
    contents, indices = open_contents(tmp_path / name), np.array([1, 7, 8])
    data = DataConfig(image_size=24, views=3, augmentation="crop_flip")
    (seen,) = views_of(next(iter(contents.betons.values())), contents, data, indices, seed=5)
    crops = [CropSpec(24, data.crop_scale, data.crop_ratio, data.flip, data.interpolation)] * 3
    with ViewLoader(directory / "train.beton", crops, seed=5, workers=1).batches(indices[None], epoch=0) as batches:
        np.testing.assert_array_equal(seen, next(batches).images[0].numpy())
    data = DataConfig(image_size=24, views=3)
    (augmented,) = views_of(next(iter(contents.betons.values())), contents, data, indices, seed=5)
    assert np.abs(augmented.astype(int) - seen).mean() > 5


def test_without_augmentation_all_views_are_the_evaluation_crop(directory):
    contents, indices = open_contents(directory), np.array([1, 7, 8])
    data = DataConfig(image_size=24, augmentation="none", views=3, local_views=2, local_size=16)
    whole = [CropSpec(24, None, flip=0.0)] * 3 + [CropSpec(16, None, flip=0.0)] * 2
    expected = load(directory / "train.beton", indices[None], 0, whole)[0].images
    for epoch in range(3):
        (batch,) = load(directory / "train.beton", indices[None], epoch, training_crops(data))
        for images, crops in zip(batch.images, expected, strict=True):
            assert torch.equal(images, crops[:, :1].expand_as(images))
    for seen, crops in zip(views_of(contents.betons["train"], contents, data, indices, seed=5), expected, strict=True):
        np.testing.assert_array_equal(seen, crops)


def test_the_sheet_has_a_row_a_sample_and_a_column_a_view(directory):
    contents = open_contents(directory)
    data = DataConfig(image_size=24, views=3, augmentation="crop_flip")
    sheet = np.asarray(contact_sheet(contents, data, rows=4, seed=0))
    indices = spread(contents.summaries["train"].labels, 9, 4, seed=0)
    seen = views_of(contents.betons["train"], contents, data, indices, 0)[0].repeat(4, 2).repeat(4, 3)
    bottom, right = sheet.shape[0] - 24, sheet.shape[1] - 24  # a margin
    np.testing.assert_array_equal(sheet[bottom - 96 : bottom, right - 96 : right], seen[3, 2])
    np.testing.assert_array_equal(sheet[bottom - 198 : bottom - 102, right - 198 : right - 102], seen[2, 1])
    wider = contact_sheet(contents, data.model_copy(update={"views": 4}), rows=2, seed=0)
    assert (wider.width - sheet.shape[1], wider.height - sheet.shape[0]) == (102, -204)


def test_small_views_stand_behind_the_large_ones(directory):
    contents, data = open_contents(directory), DataConfig(image_size=24, local_views=2, local_size=16)
    sheet = np.asarray(contact_sheet(contents, data, rows=4, seed=0))
    indices = spread(contents.summaries["train"].labels, 9, 4, seed=0)
    large, small = views_of(contents.betons["train"], contents, data, indices, 0)
    assert (large.shape, small.shape) == ((4, 2, 24, 24, 3), (4, 2, 16, 16, 3))
    bottom, right = sheet.shape[0] - 24, sheet.shape[1] - 24
    last = small.repeat(6, 2).repeat(6, 3)[3, 1]
    np.testing.assert_array_equal(sheet[bottom - 96 : bottom, right - 96 : right], last)
    right -= 2 * 102 + 6  # two small views and the wider gap before them
    last = large.repeat(4, 2).repeat(4, 3)[3, 1]
    np.testing.assert_array_equal(sheet[bottom - 96 : bottom, right - 96 : right], last)


def test_the_stored_image_is_drawn_as_it_is(directory):
    contents = open_contents(directory)
    for index, sample in enumerate(stored(directory / "train.beton")):
        image = stored_image(contents.betons["train"], contents.summaries["train"], index)
        np.testing.assert_array_equal(np.asarray(image), pixels_of(sample))


def test_samples_are_spread_over_the_classes():
    labels = np.array([5, 0, 0, 0, 0, 2, 0, 2, 0])
    for seed in range(5):
        assert labels[spread(labels, 9, 3, seed)].tolist() == [0, 2, 5]
        assert labels[spread(labels, 9, 5, seed)].tolist() == [0, 0, 2, 2, 5]
        assert sorted(spread(labels, 9, 20, seed).tolist()) == list(range(9))
    assert len({tuple(spread(labels, 9, 3, seed).tolist()) for seed in range(20)}) > 5
    assert len(spread(None, 9, 4, 0)) == 4


def test_a_damaged_sample_is_told(tmp_path):
    out = convert(folder_source(tmp_path / "in", {"cat/a.jpg": GOOD}), tmp_path / "out").directory
    content = (out / "train.beton").read_bytes()
    (out / "train.beton").write_bytes(content.replace(GOOD[-60:], bytes(60)))
    with pytest.raises(UserError, match=r"sample 0 .*; convert_dataset\.py verify names all"):
        contact_sheet(open_contents(out), DataConfig(image_size=16), rows=3, seed=0)
