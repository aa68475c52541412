"""Class folders are listed in the order of torchvision, or it is said in one line what is wrong with them."""

import os
import tempfile
from pathlib import Path

import pytest
import torchvision
from PIL import Image

from varscale.data.sources import open_source
from varscale.errors import UserError


@pytest.fixture
def open_to_all():
    """A folder that any user may enter and write, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


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
    assert list(open_source(spec).train.files) == [
        f"train/{name}" for name in ("cat/a.jpg", "dog/b.png", "dog/more/c.png")
    ]
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
