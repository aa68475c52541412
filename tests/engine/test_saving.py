"""A full disk costs a checkpoint and some patience, never the run or the older checkpoint; `best` is kept."""

import json
import os
import re
from contextlib import suppress

import pytest
import torch

from varscale.engine import saving
from varscale.engine.checkpoints import damage, read_part, read_state, write_checkpoint
from varscale.engine.distributed import Ranks
from varscale.engine.metrics import MetricsFile
from varscale.engine.rundir import find_checkpoints, latest_checkpoint
from varscale.engine.saving import CheckpointWriter

FIRST = Ranks(0, 0, 1, 1, torch.device("cpu"))


def parts(value: float, megabytes: int = 1):
    return {"model": {"w": torch.full((megabytes * 2**18,), float(value))}}


def names(run):
    return sorted(os.listdir(run / "checkpoints"))


def test_checkpoints_are_written_in_the_background_one_at_a_time(tmp_path):
    said = []
    with CheckpointWriter(tmp_path, 2, FIRST, said.append) as writer:
        for step in (1, 2, 3):
            writer.write(step, parts(step), {"step": step})
    assert said == []
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000003"]
    assert read_part(latest_checkpoint(tmp_path), "model")["w"][0] == 3


def test_a_full_disk_is_told_and_tried_again(small_disk, monkeypatch):
    monkeypatch.setattr(saving, "RETRY_AFTER", 0.0)
    said = []
    with CheckpointWriter(small_disk, 1, FIRST, said.append) as writer:
        writer.write(1, parts(1), {"step": 1})
        writer.write(2, parts(2, megabytes=12), {"step": 2})
        writer.wait()
        assert len(said) == 1
        assert "No space left on device" in said[0]
        assert "training goes on and will try again" in said[0]
        assert names(small_disk) == ["latest", "step-00000001"]
        assert damage(latest_checkpoint(small_disk)) is None
        assert writer.retry_is_due
        writer.write(3, parts(3), {"step": 3})
        writer.wait()
        assert not writer.retry_is_due, said
    assert names(small_disk) == ["latest", "step-00000003"]


def test_lost_permission_is_told(tmp_path, unprivileged):
    said = []
    with CheckpointWriter(tmp_path, 1, FIRST, said.append) as writer:
        writer.write(1, parts(1), {"step": 1})
        writer.wait()
        with unprivileged():
            writer.write(2, parts(2), {"step": 2})
            writer.wait()
    assert "Permission denied" in said[0]
    assert damage(latest_checkpoint(tmp_path)) is None


def test_what_cannot_be_deleted_is_told_and_costs_no_checkpoint(tmp_path, monkeypatch):
    said = []
    with CheckpointWriter(tmp_path, 1, FIRST, said.append) as writer:
        writer.write(1, parts(1), {"step": 1})
        writer.wait()
        monkeypatch.setattr("shutil.rmtree", lambda path, **_: os.listdir("/nowhere"))
        writer.write(2, parts(2), {"step": 2})
        assert writer.finish()
        monkeypatch.undo()
        assert len(said) == 1
        assert "old checkpoints cannot be deleted" in said[0]
        assert damage(latest_checkpoint(tmp_path)) is None
        writer.write(3, parts(3), {"step": 3})
    assert names(tmp_path) == ["latest", "step-00000003"]


def test_the_last_checkpoint_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "LAST_RETRY_AFTER", 0.01)
    attempts = []

    def fail_at_first(*arguments):
        attempts.append(arguments)
        if len(attempts) < 3 or (len(attempts) > 3 and len(attempts) < 8):
            raise OSError("no room")
        return write_checkpoint(*arguments)

    monkeypatch.setattr(saving, "write_checkpoint", fail_at_first)
    with CheckpointWriter(tmp_path, 2, FIRST, print) as writer:
        assert writer.finish(), "nothing was to be written"
        writer.write(1, parts(1), {"step": 1})
        assert writer.finish()
        writer.write(2, parts(2), {"step": 2})
        assert not writer.finish()
    assert len(attempts) == 7
    assert names(tmp_path) == ["latest", "step-00000001"]


def test_metrics_that_found_no_room_are_written_later(small_disk):
    said = []
    metrics = MetricsFile(small_disk / "metrics.jsonl", 0, said.append)
    metrics.write({"step": 1})
    with suppress(OSError), (small_disk / "fill").open("wb", buffering=0) as fill:
        while True:
            fill.write(bytes(2**12))
    for step in range(2, 1000):  # beyond the page that the file has
        metrics.write({"step": step, "text": "x" * 50})
    assert len(said) == 1
    (small_disk / "fill").unlink()
    metrics.write({"step": 1000})
    metrics.close()
    lines = (small_disk / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 1001))


def test_the_best_is_kept_however_old(tmp_path):
    with CheckpointWriter(tmp_path, 1, FIRST, print) as writer:
        for step in range(1, 5):
            writer.write(step, parts(step), {"step": step})
            if step == 2:
                writer.mark_best(step)
    assert names(tmp_path) == ["best", "latest", "step-00000002", "step-00000004"]
    assert read_state((tmp_path / "checkpoints" / "best").resolve())["step"] == 2


def test_whatever_a_kill_leaves_of_a_replacement_there_is_a_whole_checkpoint(tmp_path):
    """Each state of the folder between two system calls of a write of the step that is there already."""
    first = write_checkpoint(tmp_path, 5, parts(1), {"step": 5}, 1)
    replaced = first.rename(first.with_name(f"{first.name}-replaced"))  # killed before the new one took its place
    assert find_checkpoints(tmp_path) == [replaced]
    assert damage(replaced) is None
    half = first.with_name(f".writing-{first.name}")
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    write_checkpoint(tmp_path, 5, parts(2), {"step": 5}, 1)
    assert names(tmp_path) == ["latest", "step-00000005"]
    assert read_part(latest_checkpoint(tmp_path), "model")["w"][0] == 2


@pytest.mark.parametrize("seed", range(40))
def test_damage_at_random_bytes_is_found(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    checkpoint = write_checkpoint(tmp_path, 1, {"model": {"w": torch.zeros(64)}, "meter": {}}, {"step": 1}, 1)
    assert damage(checkpoint) is None
    files = sorted(checkpoint.iterdir())
    path = files[draw(len(files))]
    content = bytearray(path.read_bytes())
    place = draw(len(content))
    match draw(3):
        case 0:
            content[place] ^= 1 << draw(8)
        case 1:
            del content[place:]
        case 2:
            content[place:place] = b"\0" * (1 + draw(9))
    path.write_bytes(content)
    assert damage(checkpoint)


def test_every_flipped_bit_and_lost_end_of_the_sums_is_found(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 1, {"model": {"w": torch.zeros(4)}, "meter": {}}, {"step": 1}, 1)
    path = checkpoint / "SHA256SUMS"
    content = path.read_bytes()
    beside_the_digests = [place for line in re.finditer(rb"  \S+\n", content) for place in range(*line.span())]
    for place in beside_the_digests:
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            assert damage(checkpoint), (place, bit)
        path.write_bytes(content[:place])
        assert damage(checkpoint), place
    path.write_bytes(content.replace(b"\n", b"\r\n"))
    assert damage(checkpoint)
    path.write_bytes(content)
    assert damage(checkpoint) is None


def test_a_part_that_lost_its_file_and_its_sum_is_missed(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 1, {"model": {"w": torch.zeros(4)}, "meter": {}}, {"step": 1}, 1)
    (checkpoint / "meter.safetensors").unlink()
    path = checkpoint / "SHA256SUMS"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "meter" not in line))
    assert damage(checkpoint).endswith("meter.safetensors: is missing from the checkpoint")
