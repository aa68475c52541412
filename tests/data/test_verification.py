"""Verification finds every damage and nothing else, and names the file behind a damaged sample."""

import json

import pytest
from pictures import GOOD, array_source, encoded, folder_source, picture, stored

from varscale.data.conversion import convert
from varscale.data.verification import verify


@pytest.fixture
def directory(tmp_path):
    files = {f"cat/{i:03}.jpg": encoded(picture(20 + i, 30), "JPEG") for i in range(150)}
    return convert(folder_source(tmp_path / "in", files, {"dog/x.jpg": GOOD}), tmp_path / "out").directory


def change(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("workers", [1, 3])
def test_what_was_written_is_verified(directory, tmp_path, workers):
    for folder, images in ((directory, 155), (convert(array_source(), tmp_path / "arrays").directory, 80)):
        verification = verify(folder, workers=workers)
        assert verification.damage == []
        assert verification.throughput.images == images
        samples = [sample for split in ("train", "val") for sample in stored(folder / f"{split}.beton")]
        assert verification.throughput.num_bytes == sum(len(sample[3]) for sample in samples)


def test_damaged_samples_are_named_with_their_files(directory):
    path = directory / "train.beton"
    samples, content = stored(path), path.read_bytes()
    for index in (3, 70, 71):
        jpeg = samples[index][3]
        change(path, content.index(jpeg) + len(jpeg) - 40, bytes(40))
    damage = verify(directory, workers=2).damage
    assert damage[:3] == [
        f"{path}: sample {index} (train/cat/{index:03}.jpg): its JPEG data are damaged" for index in (3, 70, 71)
    ]
    assert damage[3:] == [f"{directory}: the images and labels are not those that were converted: their digest differs"]


def test_a_data_set_without_names_tells_the_number(directory):
    path = directory / "train.beton"
    (directory / "train.names.txt").unlink()
    change(path, path.read_bytes().index(stored(path)[3][3]), b"no JPEG")
    assert verify(directory).damage[0].startswith(f"{path}: sample 3: its JPEG header is damaged")


def test_a_changed_pixel_is_seen_by_the_digest(tmp_path):
    source = array_source()
    out = convert(source, tmp_path / "out").directory
    content = (out / "val.beton").read_bytes()
    change(out / "val.beton", content.index(source.val.images[4].tobytes()), b"\0\0\0\0")
    assert verify(out).damage == [
        f"{out}: the images and labels are not those that were converted: their digest differs"
    ]


def test_counts_and_names_are_compared(directory):
    info = json.loads((directory / "dataset.json").read_text())
    info["counts"]["train"][1] += 1
    (directory / "dataset.json").write_text(json.dumps(info))
    with open(directory / "val.names.txt", "a") as file:
        file.write("one/more.jpg\n")
    assert verify(directory).damage == [
        f"{directory}: train has 1 images of class 'dog', but dataset.json says 2",
        f"{directory}/val.names.txt holds 4 names, but val.beton 3 samples",
    ]
