"""The encoder of a run's checkpoint, and what is refused in its place."""

import pytest
import torch
from small_runs import make_run

from varscale.encoder.runs import new_encoder, trained_encoder
from varscale.engine.checkpoints import write_checkpoint
from varscale.errors import UserError


def test_it_is_the_frozen_encoder_of_the_newest_or_the_named_checkpoint(tmp_path, data):
    config, trained = make_run(tmp_path / "run", data, step=7)
    write_checkpoint(
        tmp_path / "run",
        9,
        {"model": {f"encoder.{key}": tensor for key, tensor in new_encoder(config).state_dict().items()}},
        {},
        keep=9,
    )
    newest, found, step = trained_encoder(tmp_path / "run")
    assert (found, step, newest.training) == (config, 9, False)
    assert not any(parameter.requires_grad for parameter in newest.parameters())
    torch.testing.assert_close(newest.state_dict(), new_encoder(config).state_dict(), rtol=0, atol=0)
    older, _, step = trained_encoder(tmp_path / "run" / "checkpoints" / "step-00000007", "cpu")
    assert step == 7
    torch.testing.assert_close(older.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_another_architecture_is_refused_with_the_keys_named(tmp_path, data):
    make_run(tmp_path / "a", data)
    make_run(tmp_path / "b", data, "encoder.name=resnet34")
    (tmp_path / "b" / "manifest.json").write_bytes((tmp_path / "a" / "manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"not hold the resnet18.*layer1\.2\.bn1\.bias.*more unknown"):
        trained_encoder(tmp_path / "b")
    make_run(tmp_path / "c", data, "encoder.stem=imagenet")
    (tmp_path / "c" / "manifest.json").write_bytes((tmp_path / "a" / "manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"conv1\.weight has shape \(64, 3, 7, 7\) instead of \(64, 3, 3, 3\)"):
        trained_encoder(tmp_path / "c")
