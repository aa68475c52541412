"""Which checkpoint a run goes on from when some are damaged, and what it says."""

import pytest
import torch
import torch.distributed as dist

from varscale.engine.checkpoints import write_checkpoint
from varscale.engine.distributed import Ranks
from varscale.engine.resume import choose
from varscale.engine.rundir import find_checkpoints
from varscale.errors import UserError

FIRST = Ranks(0, 0, 1, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def checkpoints(tmp_path):
    """The folder of three checkpoints, after steps 1, 2 and 3."""
    for step in (1, 2, 3):
        last = write_checkpoint(tmp_path, step, {"model": {"w": torch.zeros(3)}}, {"step": step}, keep=3)
    return last.parent


def chosen(checkpoints):
    found = choose(find_checkpoints(checkpoints.parent), FIRST, fall_back=True)
    return int(found.name.removeprefix("step-"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.json", "SHA256SUMS", "model.safetensors"])
@pytest.mark.parametrize("how", [flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_one_damaged_file_leads_to_the_checkpoint_before(checkpoints, capsys, name, how):
    how(checkpoints / "step-00000003" / name)
    assert chosen(checkpoints) == 2
    said = capsys.readouterr().out
    assert said.startswith(f"WARNING: {checkpoints / 'step-00000003'}/")
    assert "; going on from the checkpoint before it\n" in said
    assert said.endswith(f"going on from {checkpoints / 'step-00000002'}\n")
    assert (checkpoints / "damaged-step-00000003").is_dir()
    assert chosen(checkpoints) == 2, "once more, with the link to nowhere"


def test_two_damaged_ones_lead_to_the_third(checkpoints):
    for step in (2, 3):
        flip(checkpoints / f"step-0000000{step}" / "model.safetensors")
    assert chosen(checkpoints) == 1


def test_where_all_are_damaged_the_user_is_asked(checkpoints):
    for folder in find_checkpoints(checkpoints.parent):
        flip(folder / "state.json")
    with pytest.raises(UserError, match=r"step-00000001/state.json: is damaged .*; there is no other checkpoint"):
        chosen(checkpoints)


def test_without_a_link_the_newest_is_taken(checkpoints):
    (checkpoints / "latest").unlink()
    assert chosen(checkpoints) == 3
    (checkpoints / "latest").symlink_to("step-00000009")
    assert chosen(checkpoints) == 3


def test_a_new_run_has_none(tmp_path):
    assert choose(find_checkpoints(tmp_path), FIRST, fall_back=True) is None
