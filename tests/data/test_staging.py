"""A conversion's folder appears whole or not at all, and nobody's files are lost for it."""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from pictures import GOOD, array_source, folder_source

from varscale.data import journal
from varscale.data.conversion import PROBES, UndecodableFiles, convert, estimated_bytes
from varscale.data.dataset import read_dataset_info
from varscale.data.images import ImageOptions
from varscale.errors import UserError

RNG = np.random.default_rng(0)


def test_an_empty_folder_is_filled_and_a_data_set_is_replaced_only_if_asked(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert(array_source(20), out)
    with pytest.raises(UserError, match="already holds a data set: pass --overwrite"):
        convert(array_source(30), out)
    assert read_dataset_info(out).num_samples("train") == 20
    (out / "skipped.txt").write_text("from before")
    convert(array_source(30), out, overwrite=True)
    assert read_dataset_info(out).num_samples("train") == 30
    assert sorted(os.listdir(out)) == [
        "dataset.json",
        "train.beton",
        "train.names.txt",
        "val.beton",
        "val.names.txt",
    ]
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_overwrite_keeps_the_old_data_set(tmp_path):
    convert(array_source(20), tmp_path / "out")
    source = folder_source(tmp_path / "in", {"cat/bad.jpg": b"?"})
    with pytest.raises(UndecodableFiles):
        convert(source, tmp_path / "out", overwrite=True)
    assert read_dataset_info(tmp_path / "out").num_samples("train") == 20
    assert sorted(os.listdir(tmp_path)) == [".out.partial", "in", "out"]


@pytest.mark.parametrize("beside_a_data_set", [True, False])
def test_other_peoples_files_are_never_replaced(tmp_path, beside_a_data_set):
    out = tmp_path / "out"
    if beside_a_data_set:
        convert(array_source(20), out)
    out.mkdir(exist_ok=True)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files \(thesis\.tex\)"):
        convert(array_source(20), out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_a_file_or_a_lone_dataset_json_is_not_replaced(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file"):
        convert(array_source(20), tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match=r"out cannot be made: .*file is a file"):
        convert(array_source(20), tmp_path / "file" / "out")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="holds other files"):
        convert(array_source(20), tmp_path / "dir", overwrite=True)


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(array_source(20), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert read_dataset_info(tmp_path / "real").num_samples("train") == 20


def test_no_permission(tmp_path, unprivileged):
    with tempfile.TemporaryDirectory() as folder:
        closed, source = Path(folder), folder_source(Path(folder) / "in", {})
        (closed / "in" / "train" / "cat" / "good.png").chmod(0)
        closed.chmod(0o755 if os.geteuid() == 0 else 0o555)
        with unprivileged():
            with pytest.raises(UserError, match=r"cannot read .*train/cat/good\.png: Permission denied"):
                convert(source, Path("/tmp") / f"varscale-test-{os.getpid()}")
            for out in (closed / "out", closed / "new" / "out"):
                with pytest.raises(UserError, match=f"out: no permission to write in {closed}$"):
                    convert(array_source(), out)
        closed.chmod(0o755)
        assert os.listdir(closed) == ["in"]


def test_too_little_space_is_seen_before_the_work(small_disk):
    source = array_source(200, (128, 128))
    with pytest.raises(UserError, match=r"not enough disk space: about 0\.01 GB are needed, 0\.01 GB are free"):
        convert(source, small_disk / "out")
    assert os.listdir(small_disk) == []


def test_a_mount_point_is_refused(small_disk):
    with pytest.raises(UserError, match="is a mount point"):
        convert(array_source(), small_disk)


def test_a_disk_that_fills_up_keeps_what_is_done(small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "INTERVAL", 0)
    probed = np.linspace(0, 201, PROBES).astype(int)
    large = [index for index in range(100, 128) if index not in probed][:4]
    files = {f"cat/{i:04}.jpg": GOOD + RNG.bytes(2_000_000) * (i in large) for i in range(200)}
    source = folder_source(tmp_path / "in", files)
    assert estimated_bytes(source, ImageOptions()) < 6e6
    with pytest.raises(UserError, match=r"out: the disk is full .No space left on device.*make room") as caught:
        convert(source, small_disk / "out")
    assert caught.value.__notes__[0].startswith("96 of 204 images are kept in")
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    assert convert(source, small_disk / "out").throughput.images == 204 - 96
    convert(source, tmp_path / "whole")
    for name in os.listdir(tmp_path / "whole"):
        assert (small_disk / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_limit_on_file_sizes_leaves_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from varscale.data.conversion import convert\n"
        "from varscale.data.sources import open_source\n"
        "convert(open_source('digits'), Path(sys.argv[1]))"
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))

    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert "UserError" in result.stderr
    assert "the disk is full (File too large" in result.stderr
    assert os.listdir(tmp_path) == []
