"""A source that is named wrongly is answered with the nearest right name."""

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
