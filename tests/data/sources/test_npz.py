"""Arrays are taken as they are, or it is said in one line what is wrong with them."""

import numpy as np
import pytest

from varscale.data.sources import open_source
from varscale.errors import UserError


def arrays(**changes):
    rng = np.random.default_rng(0)
    made = {
        "x_train": rng.integers(0, 256, (9, 6, 5, 3), np.uint8),
        "y_train": np.arange(9) % 3,
        "x_test": rng.integers(0, 256, (6, 6, 5, 3), np.uint8),
        "y_test": np.array([2, 1, 0, 2, 1, 0], np.uint8),
    }
    return {key: value for key, value in (made | changes).items() if value is not None}


def save(path, **changes):
    np.savez(path, **arrays(**changes))
    return f"npz:{path}"


def test_npz_yields_its_arrays_in_order(tmp_path):
    names = np.array(["ant", "bee", "cat"])
    source = open_source(save(tmp_path / "x.npz", names=names, files=np.arange(3)))
    assert source.classes == ("ant", "bee", "cat")
    expected = arrays()
    for split, suffix in ((source.train, "train"), (source.val, "test")):
        np.testing.assert_array_equal(split.labels, expected[f"y_{suffix}"])
        assert split.labels.dtype == np.int64
        for index in range(len(split.labels)):
            np.testing.assert_array_equal(split.content(index), expected[f"x_{suffix}"][index])
    assert source.val.name(3) == "x_test[3]"


def test_npz_without_names_numbers_its_classes(tmp_path):
    assert open_source(save(tmp_path / "x.npz")).classes == ("0", "1", "2")


def test_npz_takes_bytes_names_and_grey_images(tmp_path):
    grey = arrays()["x_train"][..., :1]
    source = open_source(save(tmp_path / "x.npz", names=np.array([b"a", b"b", b"c"]), x_train=grey))
    assert source.classes == ("a", "b", "c")
    assert source.train.content(0).shape == (6, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None}, r"no array 'x_test' \(it has: x_train, y_train, y_test\)"),
        ({"x_train": np.zeros((9, 6, 5, 3))}, r"'x_train' is \(9, 6, 5, 3\) float64, but must be uint8"),
        ({"x_train": np.zeros((9, 3, 6, 5), np.uint8)}, r"'x_train' is \(9, 3, 6, 5\) uint8, but must be"),
        ({"x_train": np.zeros((9, 90), np.uint8)}, "'x_train' is"),
        ({"x_train": np.zeros((0, 6, 5, 3), np.uint8), "y_train": np.zeros(0, int)}, "'x_train' is"),
        ({"y_train": np.zeros(8, int)}, r"'y_train' is \(8,\) int64, but must be \(9,\) integer"),
        ({"y_train": np.zeros((9, 1), int)}, r"'y_train' is \(9, 1\)"),
        ({"y_train": np.zeros(9)}, r"'y_train' is \(9,\) float64"),
        ({"y_test": np.array([0, 1, 2, 0, 3, 1])}, r"y_test\[4\] is 3, but there are 3 classes"),
        ({"y_train": np.arange(9) % 3 - 1}, r"y_train\[0\] is -1"),
        ({"names": np.array(["a", "b"])}, r"y_train\[2\] is 2, but there are 2 classes .*by names"),
        ({"names": np.array(["a", "b", "a"])}, "the class name 'a' occurs more than once"),
        ({"names": np.arange(3)}, "'names' is .* must be .*text"),
        ({"names": np.array(["a", "b", "c", "d"])}, "class 'd' has no images in train"),
        ({"y_test": np.zeros(6, int)}, "class '1' has no images in val"),
        ({"y_train": np.zeros(9, int), "y_test": np.zeros(6, int)}, r"only one class \(0\)"),
        ({"x_train": np.array([{}] * 9)}, "not a complete .npz archive of plain arrays"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        open_source(save(tmp_path / "x.npz", **changes))


def test_files_that_are_no_npz_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.npz: No such file"):
        open_source(f"npz:{tmp_path / 'none.npz'}")
    for content in (b"", b"hello", b"PK\3\4" + bytes(100)):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.npz"):
            open_source(f"npz:{tmp_path / 'x.npz'}")
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(UserError, match="single array"):
        open_source(f"npz:{tmp_path / 'x.npy'}")


def test_a_damaged_npz_is_refused(tmp_path):
    save(tmp_path / "x.npz")
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[200] ^= 0xFF
    for damaged in (content, content[: len(content) // 2]):
        (tmp_path / "y.npz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"not a complete \.npz archive"):
            open_source(f"npz:{tmp_path / 'y.npz'}")
