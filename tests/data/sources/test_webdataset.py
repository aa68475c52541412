"""WebDataset's shards yield their samples in order, or say which sample is wrong."""

import io
import tarfile

import pytest

from varscale.data.images import read
from varscale.data.sources import open_source
from varscale.errors import UserError


def make_shards(root, shards):
    """shards: {"train-0": {"0001.jpg": bytes}}."""
    root.mkdir(exist_ok=True)
    for shard, files in shards.items():
        with tarfile.open(root / f"{shard}.tar", "w:") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return f"webdataset:{root}"


TRAIN = {"b.jpg": b"B", "b.cls": b"1", "x/a.cls": b"0\n", "x/a.PNG": b"A", "x/a.json": b"{}"}
VAL = {"0.jpeg": b"C", "0.cls": b"0", "1.left.jpg": b"D", "1.cls": b" 1"}


def test_samples_follow_the_shards(tmp_path):
    spec = make_shards(tmp_path / "in", {"train-01": {"b.jpg": b"E", "b.cls": b"1"}, "train-00": TRAIN, "val-0": VAL})
    source = open_source(spec)
    assert source.classes == ("0", "1")
    assert source.train.labels.tolist() == [1, 0, 1]
    assert [read(source.train.content(index)) for index in range(3)] == [b"B", b"A", b"E"]
    assert source.train.name(1) == "train-00.tar:x/a.PNG"
    assert source.val.labels.tolist() == [0, 1]
    assert source.notes == ("ignored 1 files that are not .jpg, .jpeg or .png: 1 .json",)


def test_classes_are_named_by_a_file(tmp_path):
    spec = make_shards(tmp_path / "in", {"train-0": TRAIN, "val-0": VAL})
    (tmp_path / "in" / "classes.txt").write_text("cat\ngrößer dog\n")
    assert open_source(spec).classes == ("cat", "größer dog")
    (tmp_path / "in" / "classes.txt").write_text("cat\n")
    with pytest.raises(UserError, match=r"the label of train-0\.tar:b\.jpg is 1, but there are 1 classes \(by classes"):
        open_source(spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train-1": {"c.jpg": b""}}, r"train-1\.tar: sample c has no \.cls file, but needs one"),
        ({"train-1": {"c.cls": b"0"}}, r"sample c has no \.jpg, \.jpeg or \.png file"),
        ({"train-1": {"c.webp": b"", "c.cls": b"0"}}, r"sample c has no \.jpg, \.jpeg or \.png file"),
        ({"train-1": {"c.jpg": b"", "c.png": b"", "c.cls": b"0"}}, r"sample c has 2 \.jpg, \.jpeg or \.png file"),
        (
            {"train-1": {"c.jpg": b"", "c.cls": b"cat"}},
            r"train-1\.tar: c\.cls holds b'cat', but must hold a whole number",
        ),
        ({"train-1": {"c.jpg": b"", "c.cls": b"9" * 30}}, "must hold a whole number"),
        (
            {"train-1": {"c.jpg": b"", "c.cls": b"400000000"}},
            "the largest label is 400,000,000, but there are .* images of training",
        ),
        ({"val-1": {"c.jpg": b"", "c.cls": b"2"}}, r"the label of val-1\.tar:c\.jpg is 2, but there are 2 classes"),
        ({"train-1": {"c.jpg": b"", "c.cls": b"2"}}, "class '2' has no images in val"),
        ({"train-1": {"c.jpg": b"", "c.cls": b"-1"}}, "is -1, but there are 2 classes"),
    ],
)
def test_wrong_samples_are_refused(tmp_path, changes, message):
    spec = make_shards(tmp_path / "in", {"train-0": TRAIN, "val-0": VAL} | changes)
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_missing_shards_are_told(tmp_path):
    spec = make_shards(tmp_path / "in", {"train-0": TRAIN})
    with pytest.raises(UserError, match=r"in has no shards val-\*\.tar \(such as val-000000\.tar\)"):
        open_source(spec)
