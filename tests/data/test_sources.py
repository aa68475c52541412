"""Every source yields the right images and labels in a fixed order, or says in one line what is wrong with it."""

import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from varscale.data.sources import open_source
from varscale.errors import UserError


@pytest.fixture
def open_to_all():
    """A folder that any user may enter and write, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


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


def make_folder(root, splits):
    """splits: {"train": {"cat": ["a.jpg", ...]}}; every file is a small image, or text by another suffix."""
    for split, classes in splits.items():
        for name, files in classes.items():
            (root / split / name).mkdir(parents=True)
            for file in files:
                path = root / split / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
                    Image.new("RGB", (3, 2)).save(path, "PNG" if path.suffix.lower() == ".png" else "JPEG")
                else:
                    path.write_text("hello")
    return f"imagefolder:{root}"


# --- digits


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


# --- the source's name


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
        open_source(save(tmp_path / "x.npz"), image_size=16)
    with pytest.raises(UserError, match="--download-dir is for the sources cifar10"):
        open_source("digits", download_dir=tmp_path)


# --- npz


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


# --- imagefolder

TWO = {"cat": ["a.jpg"], "dog": ["b.png"]}


def test_imagefolder_is_torchvisions_list_of_samples(tmp_path):
    train = {
        "dog": ["b.JPEG", "a.png", "sub/z.jpg", "sub-a/c.Jpg", "sub/deep/q.PNG"],
        "cat": ["2.jpg", "10.jpg", ".hidden.jpg", "notes.txt", "Thumbs.db"],
    }
    source = open_source(make_folder(tmp_path, {"train": train, "val": TWO}))
    (tmp_path / "train" / "cat" / ".hidden.jpg").unlink()  # the one thing torchvision sees otherwise
    expected = torchvision.datasets.ImageFolder(tmp_path / "train")
    found = [(source.train.content(index), label) for index, label in enumerate(source.train.labels.tolist())]
    assert found == [(str(path), label) for path, label in expected.samples]
    assert source.classes == tuple(expected.classes) == ("cat", "dog")
    assert len(source.notes) == 1
    assert source.notes[0].startswith("ignored 2 files that are not .jpg, .jpeg or .png: 1 .")


def test_imagefolder_follows_links_but_not_in_circles(tmp_path):
    spec = make_folder(tmp_path / "x", {"train": TWO, "val": TWO})
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "elsewhere" / "c.png")
    link = tmp_path / "x" / "train" / "dog" / "more"
    link.symlink_to(tmp_path / "elsewhere")
    assert open_source(spec).train.files == [f"train/{name}" for name in ("cat/a.jpg", "dog/b.png", "dog/more/c.png")]
    link.unlink()
    link.symlink_to(tmp_path / "x" / "train" / "dog")
    with pytest.raises(UserError, match="more is a link to a folder that is already part of"):
        open_source(spec)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": TWO}, r"no folder 'val' \(its folders: train\)"),
        ({"test": TWO, "val": TWO}, r"no folder 'train' \(its folders: test, val\)"),
        ({"train": TWO, "val": {"cat": ["a.jpg"]}}, "same class folders .dog only in train"),
        ({"train": TWO, "val": TWO | {"cow": ["a.jpg"]}}, "same class folders .cow only in val"),
        ({"train": TWO | {"cow": []}, "val": TWO | {"cow": ["a.jpg"]}}, "train/cow holds no .jpg, .jpeg or .png"),
        ({"train": TWO | {"cow": ["a.jpg"]}, "val": TWO | {"cow": ["a.webp"]}}, "val/cow holds no .jpg"),
        ({"train": {"cat": ["a.jpg"]}, "val": {"cat": ["b.jpg"]}}, r"only one class \(cat\)"),
        ({"train": {".cat": []}, "val": {".cat": []}}, "train has no class folders"),
    ],
)
def test_wrong_folders_are_refused(tmp_path, splits, message):
    with pytest.raises(UserError, match=message):
        open_source(make_folder(tmp_path, splits))


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the folder .*nowhere: No such file"):
        open_source(f"imagefolder:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("closed", ["", "train", "val/dog"])
def test_a_folder_without_permission_is_refused(open_to_all, unprivileged, closed):
    spec = make_folder(open_to_all, {"train": TWO, "val": TWO})
    (open_to_all / closed).chmod(0)
    with unprivileged(), pytest.raises(UserError, match=r"cannot read .*: Permission denied"):
        open_source(spec)
    (open_to_all / closed).chmod(0o755)


# --- cifar, by torchvision's own classes on archives of its own layout (its checksums replaced by those of our files)


def make_cifar(root, monkeypatch, dataset, label_key, batches, meta_key, names):
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    made = {}
    for name in batches:
        pixels = rng.integers(0, 256, (20, 3072), np.uint8)
        labels = (np.arange(20) * 3 + len(made)) % len(names)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, label_key: labels.tolist()}))
        made[name] = pixels.reshape(20, 3, 32, 32).transpose(0, 2, 3, 1), labels
    meta = dataset.meta["filename"]
    (folder / meta).write_bytes(pickle.dumps({meta_key: names}))
    monkeypatch.setattr(dataset, "train_list", [[name, None] for name in batches[:-1]])
    monkeypatch.setattr(dataset, "test_list", [[batches[-1], None]])
    monkeypatch.setitem(dataset.meta, "md5", None)
    return made


def test_cifar10(tmp_path, monkeypatch):
    names = [f"class {index}" for index in range(10)]
    made = make_cifar(
        tmp_path,
        monkeypatch,
        torchvision.datasets.CIFAR10,
        "labels",
        ["data_batch_1", "data_batch_2", "test_batch"],
        "label_names",
        names,
    )
    source = open_source("cifar10", download_dir=tmp_path)
    assert source.classes == tuple(names)
    pixels, labels = (np.concatenate(pair) for pair in zip(made["data_batch_1"], made["data_batch_2"], strict=True))
    np.testing.assert_array_equal(source.train.labels, labels)
    np.testing.assert_array_equal([source.train.content(index) for index in range(40)], pixels)
    np.testing.assert_array_equal(source.val.labels, made["test_batch"][1])


def test_cifar100_takes_the_fine_labels(tmp_path, monkeypatch):
    names = [f"fine {index}" for index in range(20)]
    made = make_cifar(
        tmp_path,
        monkeypatch,
        torchvision.datasets.CIFAR100,
        "fine_labels",
        ["train", "test"],
        "fine_label_names",
        names,
    )
    source = open_source("cifar100", download_dir=tmp_path)
    assert source.classes == tuple(names)
    np.testing.assert_array_equal(source.val.labels, made["test"][1])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_without_network_says_what_to_do(tmp_path, monkeypatch, name):
    dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    monkeypatch.setattr(dataset, "url", "http://127.0.0.1:9/cifar.tar.gz")  # nobody listens there
    with pytest.raises(UserError, match=rf"{name}: no complete copy in .*failed .*refused.*--download-dir FOLDER"):
        open_source(name, download_dir=tmp_path / "new")
    assert os.listdir(tmp_path) == []
