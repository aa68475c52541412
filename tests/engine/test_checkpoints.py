"""Checkpoints are complete or not there, the newest few are kept, and damage is found."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from varscale.engine.checkpoints import damage, put_aside, read_part, read_state, write_checkpoint
from varscale.engine.rundir import find_checkpoint, find_checkpoints, latest_checkpoint
from varscale.errors import UserError


def parts(value: float):
    return {"model": {"w": torch.full((3, 2), value), "n": torch.tensor(7)}, "optimizer": {}}


def write(run, step, keep=2):
    return write_checkpoint(run, step, parts(step), {"step": step, "samples_seen": 8 * step}, keep)


def test_what_is_written_is_read_back(tmp_path):
    checkpoint = write(tmp_path, 5)
    model = read_part(checkpoint, "model")
    assert torch.equal(model["w"], torch.full((3, 2), 5.0))
    assert model["n"] == 7
    assert read_part(checkpoint, "optimizer") == {}
    assert read_state(checkpoint)["state"] == {"step": 5, "samples_seen": 40}
    assert latest_checkpoint(tmp_path) == checkpoint
    assert find_checkpoint(tmp_path) == (tmp_path, checkpoint)
    assert find_checkpoint(checkpoint) == (tmp_path, checkpoint)


def test_the_newest_are_kept_and_nothing_else_is_left(tmp_path):
    for step in (1, 2, 3, 10):
        write(tmp_path, step)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000003", "step-00000010"]


def test_what_a_run_left_when_it_went_on_from_an_older_checkpoint_goes_first_and_is_taken_last(tmp_path):
    def found():
        return [int(path.name.removeprefix("step-")) for path in find_checkpoints(tmp_path)]

    for step in (20, 5):
        write(tmp_path, step)
    assert found() == [5, 20]
    write(tmp_path, 6)
    assert found() == [6, 5]
    write(tmp_path, 7)
    put_aside(find_checkpoints(tmp_path)[0])
    assert found() == [6]
    (tmp_path / "checkpoints" / "latest").unlink()
    write(tmp_path, 3, keep=9)
    (tmp_path / "checkpoints" / "latest").unlink()
    assert found() == [6, 3], "without a link the newest is preferred"


def test_writing_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 3)
    checkpoint = write_checkpoint(tmp_path, 3, parts(9.0), {}, 2)
    assert read_part(checkpoint, "model")["w"][0, 0] == 9.0


def test_a_failed_write_leaves_the_older_checkpoint(tmp_path):
    older = write(tmp_path, 1)
    unwritable = {"model": parts(2.0)["model"], "no/such/folder": {"w": torch.zeros(1)}}
    with pytest.raises(OSError, match="step-00000002"):
        write_checkpoint(tmp_path, 2, unwritable, {}, 2)
    assert latest_checkpoint(tmp_path) == older
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000001"]


@pytest.mark.parametrize("position", [0, 40, -1])
def test_a_changed_byte_is_found(tmp_path, position):
    checkpoint = write(tmp_path, 1)
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors: is damaged"):
        read_part(checkpoint, "model")


def test_missing_parts_are_named(tmp_path):
    checkpoint = write(tmp_path, 1)
    with pytest.raises(UserError, match=r"teacher.safetensors: is missing"):
        read_part(checkpoint, "teacher")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors: is missing"):
        read_part(checkpoint, "model")
    (checkpoint / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state.json: is damaged"):
        read_state(checkpoint)
    (checkpoint / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"SHA256SUMS: cannot be read"):
        read_state(checkpoint)


def test_a_part_that_cannot_be_read_is_damage(unprivileged):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # tmp_path would be closed to others altogether
        checkpoint = write(Path(folder), 1)
        for path in checkpoint.iterdir():
            path.chmod(0 if path.stem == "model" else 0o644)
        with unprivileged():
            found = damage(checkpoint)
    assert "Permission denied" in found
    assert "model.safetensors" in found


def test_only_the_last_damaged_one_is_kept(tmp_path):
    for step in (1, 2):
        put_aside(write(tmp_path, step, keep=9))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["damaged-step-00000002", "latest"]


def test_every_name_reaches_the_disk_after_what_it_names(tmp_path, monkeypatch):
    """What a power cut leaves depends on this order alone."""
    write(tmp_path / "a run", 1)
    done = []

    def spy(name, describe):
        real = getattr(os, name)

        def call(*arguments, **options):
            done.append((name, describe(*arguments)))
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    def file_name(handle):
        return os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path)

    spy("fsync", file_name)
    for name in ("rename", "replace"):
        spy(name, lambda _, target: os.path.relpath(target, tmp_path))
    write(tmp_path / "run", 1)
    folder, aside = "run/checkpoints", "run/checkpoints/.writing-step-00000001"
    files = ["SHA256SUMS", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(done[:2]) == [("fsync", "."), ("fsync", "run")]
    assert sorted(done[2:6]) == [("fsync", f"{aside}/{name}") for name in files]
    assert done[6:] == [
        ("fsync", aside),
        ("rename", f"{folder}/step-00000001"),
        ("fsync", folder),
        ("replace", f"{folder}/latest"),
        ("fsync", folder),
    ]


def test_a_run_without_checkpoint_and_a_misspelt_run_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "varcon").mkdir()
    with pytest.raises(UserError, match=r"there is no such run; nearest: .*varcon"):
        find_checkpoint(tmp_path / "varcom")


def test_others_may_read_it(tmp_path):
    (tmp_path / "beside").touch()
    modes = {path.stat().st_mode & 0o777 for path in write(tmp_path, 1).iterdir()}
    assert modes == {(tmp_path / "beside").stat().st_mode & 0o777}


def test_the_sums_are_those_of_sha256sum(tmp_path):
    checkpoint = write(tmp_path, 1)
    lines = (checkpoint / "SHA256SUMS").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=checkpoint).returncode == 0
