"""Tar archives are read where they lie and yield what their unpacked folders would, or say what is wrong with them."""

import gzip
import io
import os
import tarfile
import tracemalloc

import pytest
from pictures import GOOD, encoded, picture

from varscale.data.conversion import convert
from varscale.data.images import ImageOptions, read
from varscale.data.names import sample_name
from varscale.data.sources import open_source
from varscale.errors import UserError

SPLIT = {"dog/b.jpg": b"1", "cat/z.png": b"22", "cat/deep/a.JPEG": b"333", "cat/deep-b/c.jpg": b"4", "dog/a.jpg": b"5"}


def make_tar(path, files, form=tarfile.GNU_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:", format=form) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def both(path, files, prefix=""):
    return make_tar(
        path, {f"{prefix}{split}/{name}": data for split in ("train", "val") for name, data in files.items()}
    )


def listed(split):
    return [(split.name(i), read(split.content(i)), label) for i, label in enumerate(split.labels.tolist())]


def test_one_tar_of_both_splits(tmp_path):
    source = open_source(f"tar:{both(tmp_path / 'x.tar', SPLIT, './pets/')}")
    assert source.classes == ("cat", "dog")
    assert listed(source.val) == [
        ("x.tar:pets/val/cat/z.png", b"22", 0),
        ("x.tar:pets/val/cat/deep/a.JPEG", b"333", 0),
        ("x.tar:pets/val/cat/deep-b/c.jpg", b"4", 0),
        ("x.tar:pets/val/dog/a.jpg", b"5", 1),
        ("x.tar:pets/val/dog/b.jpg", b"1", 1),
    ]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "train/", "very/" * 40])
def test_a_tar_for_each_split(tmp_path, form, prefix):
    train = make_tar(tmp_path / "a.tar", {f"{prefix}{name}": data for name, data in SPLIT.items()}, form)
    val = make_tar(tmp_path / "b.tar", {"cat/ä.jpg": b"x", "dog/b.jpg": b"yy"}, form)
    source = open_source(f"tar:{train},{val}")
    assert [data for _, data, _ in listed(source.train)] == [b"22", b"333", b"4", b"5", b"1"]
    assert listed(source.val) == [("b.tar:cat/ä.jpg", b"x", 0), ("b.tar:dog/b.jpg", b"yy", 1)]


def test_a_folder_of_tars_one_a_class(tmp_path):
    for split in ("train", "val"):
        make_tar(tmp_path / split / "n02.tar", {"n02_1.JPEG": b"1", "n02_0.JPEG": b"0"})
        make_tar(tmp_path / split / "n01.tar", {"n01_9.JPEG": b"9"})
    source = open_source(f"tar:{tmp_path}/train,{tmp_path}/val")
    assert source.classes == ("n01", "n02")
    expected = [("n01.tar:n01_9.JPEG", b"9", 0), ("n02.tar:n02_0.JPEG", b"0", 1), ("n02.tar:n02_1.JPEG", b"1", 1)]
    assert listed(source.train) == expected


def test_a_tar_converts_to_the_bytes_of_its_unpacked_folders(tmp_path):
    images = {f"{'cat' if i % 3 else 'dog'}/{i}.jpg": encoded(picture(20 + i, 30), "JPEG") for i in range(40)}
    archive = both(tmp_path / "x.tar", images | {"dog/9.png": encoded(picture(), "PNG")})
    with tarfile.open(archive) as unpacked:
        unpacked.extractall(tmp_path / "x", filter="data")
    folder = convert(open_source(f"imagefolder:{tmp_path / 'x'}"), tmp_path / "folder", workers=2)
    tar = convert(open_source(f"tar:{archive}"), tmp_path / "tar", workers=2)
    assert tar.info.digest == folder.info.digest
    assert sample_name(tar.directory, "train", 0) == "x.tar:train/cat/1.jpg"


def test_what_is_no_image_is_told_and_hidden_files_are_not(tmp_path):
    files = SPLIT | {"cat/notes.txt": b"?", "cat/._z.png": b"?", ".cache/x.jpg": b"?", "labels.csv": b"?"}
    source = open_source(f"tar:{both(tmp_path / 'x.tar', files)}")
    assert len(source.train.labels) == 5
    assert source.notes == ("ignored 4 files that are not .jpg, .jpeg or .png: 2 .txt, 2 .csv",)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (
            {"cat/a.jpg": b"", "dog/a.jpg": b""},
            {"cat/a.jpg": b"", "b/cow/a.jpg": b""},
            "b only in val, dog only in train",
        ),
        ({"a.jpg": b"", "b.jpg": b""}, SPLIT, r"a.tar: a.jpg lies in no class folder; a tar must hold CLASS/IMAGE"),
        ({"cat/a.jpg": b"", "b.jpg": b""}, SPLIT, r"a.tar: b.jpg lies in no class folder"),
        ({"cat/a.jpg": b""}, {"cat/a.jpg": b""}, r"only one class \(cat\)"),
        ({"cat/a.gif": b""}, SPLIT, r"a.tar holds no .jpg, .jpeg or .png file"),
        ({}, SPLIT, r"a.tar"),
    ],
)
def test_wrong_contents_are_refused(tmp_path, train, val, message):
    spec = f"tar:{make_tar(tmp_path / 'a.tar', train)},{make_tar(tmp_path / 'b.tar', val)}"
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_wrong_places_are_refused(tmp_path):
    archive = make_tar(tmp_path / "x.tar", {f"train/{name}": data for name, data in SPLIT.items()})
    with pytest.raises(UserError, match=r"no images in a folder .*write tar:TRAIN\.tar,VAL\.tar"):
        open_source(f"tar:{archive}")
    with pytest.raises(UserError, match=r"cannot read .*none\.tar: No such file"):
        open_source(f"tar:{tmp_path / 'none.tar'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no CLASS\.tar; for a folder of class folders write imagefolder:DIR"):
        open_source(f"tar:{tmp_path / 'empty'},{archive}")


def test_a_compressed_tar_is_refused_with_the_command_to_unpack_it(tmp_path):
    packed = tmp_path / "x.tar.gz"
    packed.write_bytes(gzip.compress(both(tmp_path / "x.tar", SPLIT).read_bytes()))
    with pytest.raises(UserError, match=rf"{packed} is compressed.*unpack it by gunzip --keep {packed}$"):
        open_source(f"tar:{packed}")


def test_a_tar_cut_anywhere_or_damaged_is_refused(tmp_path):
    content = both(tmp_path / "x.tar", SPLIT).read_bytes()
    end = 2 * len(SPLIT) * 1024  # a header and a block of data for each
    cut = tmp_path / "cut.tar"
    for length in (0, 100, 512, 700, 1024, 1500, end - 512, end - 100, end, end + 100):
        cut.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.tar"):
            open_source(f"tar:{cut}")
    cut.write_bytes(content[:4096] + b"\xff" * 512 + content[4608:])
    with pytest.raises(UserError, match=r"cut\.tar is truncated or damaged at byte 4,096"):
        open_source(f"tar:{cut}")


def test_a_tar_that_shrinks_after_it_was_listed_is_told(tmp_path):
    archive = both(tmp_path / "x.tar", dict.fromkeys(SPLIT, GOOD))
    source = open_source(f"tar:{archive}")
    os.truncate(archive, 5000)
    with pytest.raises(UserError, match=r"cannot read .*x\.tar: it has become shorter"):
        convert(source, tmp_path / "out", image_options=ImageOptions())


def test_listing_takes_little_memory(tmp_path):
    """An ImageNet of 1.28 million images must be listed in little more than its names and places take twice."""
    count = 20_000
    names = [f"train/n{i % 100:08}/n{i % 100:08}_{i}.JPEG" for i in range(count)]
    archive = make_tar(tmp_path / "x.tar", dict.fromkeys([*names, "val/n00000000/1.JPEG"], b""))
    del names
    tracemalloc.start()
    with pytest.raises(UserError, match="only in train"):  # val has one class only, which is found after listing
        open_source(f"tar:{archive}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / count < 200
