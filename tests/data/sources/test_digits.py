"""The digits are all there, keep their shape, and are always split alike."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from varscale.data.sources import open_source
from varscale.errors import UserError


def test_digits_are_all_there_and_split_by_class():
    source = open_source("digits")
    assert source.classes == tuple("0123456789")
    assert len(source.train.labels) + len(source.val.labels) == 1797
    counts = [np.bincount(split.labels) for split in (source.train, source.val)]
    np.testing.assert_array_equal(counts[0] + counts[1], np.bincount(load_digits().target))
    np.testing.assert_allclose(counts[1] / (counts[0] + counts[1]), 0.2, atol=0.004)


@pytest.mark.parametrize("size", [16, 32])
def test_digits_keep_their_shape_when_enlarged(size):
    source = open_source("digits", image_size=size)
    image = source.train.content(0)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    train, val = (split.images[..., 0].astype(float) for split in (source.train, source.val))
    # Averaged back to 8x8 they are the originals again, and every original occurs once (one pair is almost equal).
    small = np.concatenate([train, val]).reshape(1797, 8, size // 8, 8, size // 8).mean((2, 4)) * 16 / 255
    labels = np.concatenate([source.train.labels, source.val.labels])
    digits = load_digits()
    nearest = ((small[:, None] - digits.images[None]) ** 2).sum((2, 3)).argmin(1)
    assert len(set(nearest.tolist())) >= 1796
    np.testing.assert_array_equal(digits.target[nearest], labels)


def test_digits_held_out_fifth_never_changes():
    source = open_source("digits", image_size=16)
    np.testing.assert_array_equal(source.val.labels[:20], [1, 5, 8, 6, 1, 3, 8, 9, 5, 5, 9, 1, 0, 6, 0, 6, 3, 4, 0, 3])
    np.testing.assert_array_equal(source.val.images, open_source("digits", image_size=16).val.images)
    knn = KNeighborsClassifier(3).fit(source.train.images.reshape(-1, 768), source.train.labels)
    assert knn.score(source.val.images.reshape(-1, 768), source.val.labels) > 0.97  # a split as hard as any other


def test_digits_come_in_two_sizes():
    with pytest.raises(UserError, match=r"--image-size 24.*32 and 16"):
        open_source("digits", image_size=24)
