"""The exported encoder, loaded by torchvision; and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from varscale.config import Config, load_config
from varscale.data.conversion import convert
from varscale.data.sources import open_source
from varscale.engine.checkpoints import write_checkpoint
from varscale.engine.manifest import write_manifest
from varscale.errors import UserError
from varscale.export import export_encoder, load_encoder, main, new_encoder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("data")
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "a.npz", x_train=images, y_train=np.arange(12) % 2, x_test=images[:4], y_test=np.arange(4) % 2)
    return folder / "a", convert(open_source(f"npz:{folder / 'a.npz'}"), folder / "a").info.digest


def make_run(run: Path, data: tuple[Path, str], *overrides: str, step: int = 7) -> tuple[Config, nn.Module]:
    """A run with one checkpoint of an encoder that is not the untrained one."""
    config = load_config(
        "digits-varcon",
        [f"output_dir={run}", f"data.dir={data[0]}", "data.image_size=16", "encoder.stem=cifar", *overrides],
    )
    encoder = new_encoder(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.01)
    write_manifest(config, {}, data[1], world_size=1, device="cpu")
    tensors = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    write_checkpoint(run, step, {"model": tensors | {"head.weight": torch.zeros(3)}}, {}, keep=9)
    return config, encoder.eval()


def torchvision_model(name: str) -> nn.Module:
    if name == "vit_s":
        shape = {"hidden_dim": 384, "num_layers": 12, "num_heads": 6, "mlp_dim": 1536}
        model = torchvision.models.VisionTransformer(image_size=16, patch_size=4, **shape)
        model.heads = nn.Identity()
        return model
    model = getattr(torchvision.models, name)()
    model.fc = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("resnet18", ("encoder.stem=cifar",)),
        ("resnet50", ("encoder.stem=imagenet",)),
        ("vit_s", ("encoder={name: vit_s, patch_size: 4}",)),
    ],
)
def test_torchvisions_model_loads_it_strictly_and_agrees(tmp_path, data, name, overrides):
    _, encoder = make_run(tmp_path / "run", data, f"encoder.name={name}", *overrides)
    export_encoder(tmp_path / "run", tmp_path / "e.safetensors")
    model = torchvision_model(name)
    if "encoder.stem=cifar" in overrides:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    model.load_state_dict(load_file(tmp_path / "e.safetensors"), strict=True)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), encoder(images))


def test_the_header_says_how_to_prepare_images(tmp_path, data):
    make_run(tmp_path / "run", data, step=42)
    export_encoder(tmp_path / "run", tmp_path / "e.safetensors")
    with safe_open(tmp_path / "e.safetensors", framework="pt") as file:
        header = file.metadata()
    described = json.loads((data[0] / "dataset.json").read_text())
    assert json.loads(header["mean"]) == described["mean"]
    assert json.loads(header["std"]) == described["std"]
    expected = {"name": "resnet18", "stem": "cifar", "image_size": "16", "feature_dim": "512", "step": "42"}
    assert {key: header[key] for key in expected} == expected
    assert header["data_digest"] == data[1]


def test_load_encoder_gives_the_frozen_encoder_of_the_newest_or_the_named_checkpoint(tmp_path, data):
    config, trained = make_run(tmp_path / "run", data, step=7)
    write_checkpoint(
        tmp_path / "run",
        9,
        {"model": {f"encoder.{key}": tensor for key, tensor in new_encoder(config).state_dict().items()}},
        {},
        keep=9,
    )
    newest, found, step = load_encoder(tmp_path / "run")
    assert (found, step, newest.training) == (config, 9, False)
    assert not any(parameter.requires_grad for parameter in newest.parameters())
    torch.testing.assert_close(newest.state_dict(), new_encoder(config).state_dict(), rtol=0, atol=0)
    older, _, step = load_encoder(tmp_path / "run" / "checkpoints" / "step-00000007", "cpu")
    assert step == 7
    torch.testing.assert_close(older.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_another_architecture_is_refused_with_the_keys_named(tmp_path, data):
    make_run(tmp_path / "a", data)
    make_run(tmp_path / "b", data, "encoder.name=resnet34")
    (tmp_path / "b" / "manifest.json").write_bytes((tmp_path / "a" / "manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"not hold the resnet18.*layer1\.2\.bn1\.bias.*more unknown"):
        load_encoder(tmp_path / "b")
    make_run(tmp_path / "c", data, "encoder.stem=imagenet")
    (tmp_path / "c" / "manifest.json").write_bytes((tmp_path / "a" / "manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"conv1\.weight has shape \(64, 3, 7, 7\) instead of \(64, 3, 3, 3\)"):
        load_encoder(tmp_path / "c")


def test_an_existing_file_stays_unless_told_otherwise(tmp_path, data, capsys):
    make_run(tmp_path / "run", data)
    out = tmp_path / "e.safetensors"
    out.write_text("precious")
    arguments = ["--checkpoint", str(tmp_path / "run"), "--out", str(out)]
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert main([*arguments, "--overwrite"]) == 0
    assert load_file(out)


@pytest.mark.parametrize(
    ("run", "out", "expected"),
    [
        ("rum", "e.safetensors", "no such run; nearest:"),
        ("run", "nowhere/e.safetensors", "the folder"),
        ("run", ".", "exists already"),
    ],
)
def test_bad_arguments_are_told_in_one_line_and_leave_nothing(tmp_path, data, capsys, run, out, expected):
    make_run(tmp_path / "run", data)
    before = sorted(tmp_path.rglob("*"))
    assert main(["--checkpoint", str(tmp_path / run), "--out", str(tmp_path / out)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert expected in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_data_set_that_was_moved_is_named_by_hand(tmp_path, data, capsys):
    make_run(tmp_path / "run", (tmp_path / "gone", data[1]))
    arguments = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "e.safetensors")]
    assert main(arguments) == 2
    assert "name its place by --data" in capsys.readouterr().err
    assert main([*arguments, "--data", str(data[0])]) == 0


def test_the_normalisation_of_other_data_is_not_taken_for_the_runs(tmp_path, data, capsys):
    make_run(tmp_path / "run", (data[0], "0" * 64))
    arguments = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "e.safetensors")]
    assert main([*arguments, "--data", str(data[0])]) == 2
    assert "digest 000000000000" in capsys.readouterr().err
    assert not (tmp_path / "e.safetensors").exists()
