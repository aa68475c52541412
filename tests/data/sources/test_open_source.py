"""A source that is named wrongly is answered with the nearest right name."""

import numpy as np
import pytest

from varscale.data.sources import open_source
from varscale.errors import UserError


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", r"unknown source 'digit' \(did you mean digits\?\); accepted: digits, cifar10, cifar100, npz:FILE"),
        ("CIFAR-10", r"did you mean cifar10\?"),
        ("npy:x", r"did you mean npz:FILE\?"),
        ("imagefolders:/x", r"did you mean imagefolder:DIR\?"),
        ("npz", r"did you mean npz:FILE\?"),
        ("npz:", r"did you mean npz:FILE\?"),
        ("/data/x.npz", r"write npz:/data/x\.npz"),
        ("/data/x.tar", r"write tar:/data/x\.tar"),
        ("webdatasets:x", r"did you mean webdataset:DIR\?"),
        ("zzzz", r"unknown source 'zzzz'; accepted"),
    ],
)
def test_unknown_source_names_the_nearest(spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_a_bare_folder_is_pointed_to_imagefolder(tmp_path):
    with pytest.raises(UserError, match=f"write imagefolder:{tmp_path}"):
        open_source(str(tmp_path))


def test_options_of_other_sources_are_refused(tmp_path):
    with pytest.raises(UserError, match="--image-size is for the source digits only"):
        open_source(f"npz:{tmp_path}/x.npz", image_size=16)
    with pytest.raises(UserError, match="--download-dir is for the sources cifar10"):
        open_source("digits", download_dir=tmp_path)


def test_a_part_of_each_class_is_the_first_images_of_it():
    whole = open_source("digits")
    part = open_source("digits", per_class=(5, 2))
    assert np.bincount(part.train.labels).tolist() == [5] * 10
    assert np.bincount(part.val.labels).tolist() == [2] * 10
    rows = [np.flatnonzero(whole.train.labels == label)[:5] for label in range(10)]
    for place, row in enumerate(sorted(np.concatenate(rows))):
        assert part.train.labels[place] == whole.train.labels[row]
        assert part.train.name(place) == whole.train.name(row)
        np.testing.assert_array_equal(part.train.content(place), whole.train.content(row))
    assert list(part.train.identity()) != list(open_source("digits", per_class=(6, 2)).train.identity())
    assert len(open_source("digits", per_class=(10_000, 1)).train.labels) == len(whole.train.labels)
    assert part.notes[-1] == "of each class the first 5 images of train and 2 of val"
