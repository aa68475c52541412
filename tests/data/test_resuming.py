"""An interrupted conversion goes on where it stood, does no finished work again, and ends in the same bytes."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from pictures import GOOD, array_source, encoded, folder_source, picture

from varscale.data import conversion, encoding, journal, staging
from varscale.data.conversion import UndecodableFiles, convert
from varscale.data.images import ImageOptions
from varscale.errors import UserError

FILES = ("train.beton", "val.beton", "train.names.txt", "val.names.txt", "dataset.json")

# Converts sys.argv[1] into sys.argv[2], in steps slow enough to be killed; sys.argv[3] lists the images encoded.
SLOW = """
import sys, time
from pathlib import Path
from varscale.data import conversion, encoding, journal
from varscale.data.sources import open_source

journal.INTERVAL = 0
encode = encoding.encode_chunk
def slowly(contents, options):
    with open(sys.argv[3], "a") as log:
        log.writelines(f"{content}\\n" for content in contents)
    time.sleep(0.04)
    return encode(contents, options)
encoding.encode_chunk = slowly
conversion.convert(open_source(sys.argv[1]), Path(sys.argv[2]), progress=True)
"""


class Stopped(Exception):
    pass


@pytest.fixture
def stop_after(monkeypatch):
    """A function: the next conversion is interrupted after so many chunks; returns the list of chunks encoded since."""
    encode = encoding.encode_chunk
    monkeypatch.setattr(journal, "INTERVAL", 0)

    def stop(chunks=None):
        encoded_since = []

        def stopping(contents, options):
            if chunks is not None and len(encoded_since) == chunks:
                raise Stopped
            encoded_since.append(contents)
            return encode(contents, options)

        monkeypatch.setattr(encoding, "encode_chunk", stopping)
        return encoded_since

    return stop


def contents_of(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def interrupted(stop_after, source, out, chunks=3):
    stop_after(chunks)
    with pytest.raises(Stopped) as caught:
        convert(source, out)
    stop_after(None)
    return caught.value


def partial(out):
    return out.parent / f".{out.name}.partial"


def mixed_source(root):
    """JPEGs of growing sizes, some greater than the smallest page, and a PNG."""
    noise = np.random.default_rng(0).bytes(2_200_000)
    files = {f"cat/{i:03}.jpg": encoded(picture(20 + i, 30), "JPEG") for i in range(150)}
    files |= {f"cat/{i:03}.jpg": GOOD + noise for i in (40, 100)}
    return folder_source(root, files | {"dog/x.png": encoded(picture(200, 100), "PNG")}, {"dog/y.jpg": GOOD})


@pytest.mark.parametrize("chunks", range(6))
def test_the_result_is_that_of_an_uninterrupted_conversion(tmp_path, stop_after, chunks):
    source = mixed_source(tmp_path / "in")
    expected = contents_of(convert(source, tmp_path / "whole").directory)
    interrupted(stop_after, source, tmp_path / "out", chunks)
    assert partial(tmp_path / "out").exists() == (chunks > 0)
    encoded_since = stop_after(None)
    convert(source, tmp_path / "out")
    assert contents_of(tmp_path / "out") == expected
    assert len(encoded_since) == 6 - chunks
    assert not partial(tmp_path / "out").exists()


def test_several_interruptions_and_other_numbers_of_workers(tmp_path, stop_after, monkeypatch):
    source = mixed_source(tmp_path / "in")
    expected = contents_of(convert(source, tmp_path / "whole").directory)
    for _ in range(3):
        interrupted(stop_after, source, tmp_path / "out", 1)
    monkeypatch.undo()
    convert(source, tmp_path / "out", workers=2)
    assert contents_of(tmp_path / "out") == expected


def test_what_is_kept_is_told(tmp_path, stop_after, capsys):
    source = array_source(200)
    error = interrupted(stop_after, source, tmp_path / "out")
    assert error.__notes__ == [
        f"96 of 210 images are kept in {partial(tmp_path / 'out')}; "
        "the same command goes on with them, --fresh starts over"
    ]
    convert(source, tmp_path / "out", progress=True)
    assert "note: going on after 96 of 210 images\n" in capsys.readouterr().err


@pytest.mark.parametrize("kills", [(33,), (65, 40), (1, 129)])
def test_a_killed_conversion_goes_on(tmp_path, kills):
    """Each is killed once so many images are in hand; those before the chunk in hand are kept."""
    source = mixed_source(tmp_path / "in")
    expected = contents_of(convert(source, tmp_path / "whole").directory)
    out, log = tmp_path / "out", tmp_path / "encoded.txt"
    command = [sys.executable, "-c", SLOW, f"imagefolder:{tmp_path / 'in'}", out, log]
    kept = 0
    for images in kills:
        log.write_text("")
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            while len(log.read_text().splitlines()) < images:
                assert process.poll() is None
                time.sleep(0.005)
            process.kill()
        kept += (len(log.read_text().splitlines()) - 1) // 32 * 32
        assert not out.exists()
    log.write_text("")
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert contents_of(out) == expected
    assert f"note: going on after {kept} of 156 images" in result.stderr
    assert len(log.read_text().splitlines()) == 156 - kept


@pytest.mark.parametrize("place", ["journal.json", "train.entries", "result/train.beton"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_work_is_not_gone_on_with(tmp_path, stop_after, capsys, place, damage):
    source = array_source(200)
    expected = contents_of(convert(source, tmp_path / "whole").directory)
    interrupted(stop_after, source, tmp_path / "out")
    path = partial(tmp_path / "out") / place
    content = bytearray(path.read_bytes())
    middle = content.index(bytes(source.train.images[50])) if place.endswith("beton") else len(content) // 2 + 6
    content[middle] ^= 1
    if damage == "flip":
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:middle])
    else:
        path.unlink()
    encoded_since = stop_after(None)
    convert(source, tmp_path / "out", progress=True)
    assert contents_of(tmp_path / "out") == expected
    assert len(encoded_since) == 8
    if place != "journal.json" or damage != "remove":
        assert re.search(r"note: starting over, for .*\.out\.partial is of no use: its .*\n", capsys.readouterr().err)


def change_label(source):
    labels = source.train.labels.copy()
    labels[[0, 1]] = labels[[1, 0]]
    return replace(source, train=replace(source.train, labels=labels))


def change_pixel(source):
    images = source.val.images.copy()
    images[0, 0, 0, 0] ^= 1
    return replace(source, val=replace(source.val, images=images))


@pytest.mark.parametrize(
    "change",
    [change_label, change_pixel, lambda source: replace(source, classes=("a", "c")), lambda _: array_source(199)],
)
def test_another_source_starts_over(tmp_path, stop_after, capsys, change):
    source = array_source(200)
    interrupted(stop_after, source, tmp_path / "out")
    convert(change(source), tmp_path / "out", progress=True)
    assert "is of no use: it is of another source" in capsys.readouterr().err
    convert(change(source), tmp_path / "whole")
    assert contents_of(tmp_path / "out") == contents_of(tmp_path / "whole")


def test_other_options_or_fresh_start_over(tmp_path, stop_after, capsys):
    source = array_source(200)
    interrupted(stop_after, source, tmp_path / "out")
    convert(source, tmp_path / "out", image_options=ImageOptions(max_resolution=5), progress=True)
    assert "starting over" in capsys.readouterr().err
    interrupted(stop_after, source, tmp_path / "fresh")
    encoded_since = stop_after(None)
    convert(source, tmp_path / "fresh", fresh=True, progress=True)
    assert "note" not in capsys.readouterr().err
    assert len(encoded_since) == 8


def test_skipping_bad_images_needs_no_second_look(tmp_path, stop_after):
    source = folder_source(tmp_path / "in", {"cat/a.jpg": b"?", "cat/b.jpg": GOOD})
    with pytest.raises(UndecodableFiles):
        convert(source, tmp_path / "out")
    encoded_since = stop_after(None)
    assert convert(source, tmp_path / "out", skip_bad=True).info.skipped == 1
    assert encoded_since == []


def test_a_mended_image_is_looked_at_again(tmp_path, capsys):
    source = folder_source(tmp_path / "in", {"cat/a.jpg": b"?"})
    with pytest.raises(UndecodableFiles):
        convert(source, tmp_path / "out")
    (tmp_path / "in" / "train" / "cat" / "a.jpg").write_bytes(GOOD)
    assert convert(source, tmp_path / "out", progress=True).info.num_samples("train") == 3
    assert "images that could not be decoded have changed since" in capsys.readouterr().err


def test_two_conversions_into_one_folder_do_not_meet(tmp_path, stop_after, monkeypatch):
    first, second = [], []
    encode = encoding.encode_chunk

    def meeting(contents, options):
        if not second:
            second.append(None)
            with pytest.raises(UserError, match=r"another conversion is writing .*out: wait for its end"):
                convert(array_source(50), tmp_path / "out", fresh=True)
        first.append(contents)
        return encode(contents, options)

    monkeypatch.setattr(encoding, "encode_chunk", meeting)
    convert(array_source(200), tmp_path / "out")
    assert len(first) == 8
    convert(array_source(200), tmp_path / "alone")
    assert contents_of(tmp_path / "out") == contents_of(tmp_path / "alone")


def test_a_data_set_set_aside_by_a_killed_overwrite_comes_back(tmp_path, stop_after):
    convert(array_source(20), tmp_path / "out")
    expected = contents_of(tmp_path / "out")
    partial(tmp_path / "out").mkdir()
    (tmp_path / "out").rename(staging.Stage(partial(tmp_path / "out")).replaced)
    with pytest.raises(UserError, match="already holds a data set"):
        convert(array_source(30), tmp_path / "out")
    assert contents_of(tmp_path / "out") == expected


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_an_interrupt_between_two_images_loses_none(tmp_path, stop_after, monkeypatch):
    """Ctrl-C comes at any place: here after an image was written and before it was counted."""
    source = array_source(200)
    update = conversion.update_digest
    calls = []

    def interrupted_update(*arguments):
        calls.append(None)
        if len(calls) == 70:
            os.kill(os.getpid(), signal.SIGINT)
        update(*arguments)

    monkeypatch.setattr(conversion, "update_digest", interrupted_update)
    with pytest.raises(KeyboardInterrupt) as caught:
        convert(source, tmp_path / "out")
    assert caught.value.__notes__[0].startswith("64 of 210 images are kept")
    monkeypatch.undo()
    convert(source, tmp_path / "out")
    assert contents_of(tmp_path / "out") == contents_of(convert(source, tmp_path / "whole").directory)
