"""Exported files in the models of torchvision and timm, made by the lines of Python that the file itself gives."""

import pytest
import torch
from safetensors import safe_open
from small_runs import VIT, make_run

from varscale.encoder.description import Description
from varscale.encoder.names import loading_code
from varscale.export import export_encoder


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(
    "encoder",
    [
        ("encoder.stem=cifar",),
        ("encoder.name=resnet50", "encoder.stem=imagenet"),
        VIT,
        ("encoder={name: vit_s, patch_size: 8}",),
    ],
)
def test_its_model_loads_it_strictly_and_agrees(tmp_path, data, monkeypatch, library, encoder):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install {library}")
    _, expected = make_run(tmp_path / "run", data, *encoder)
    export_encoder(tmp_path / "run", tmp_path / "e.safetensors", names=library)
    with safe_open(tmp_path / "e.safetensors", framework="pt") as file:
        code = file.metadata()["load"]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](images), expected(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_b", "vit_l"])
def test_the_large_transformers_have_the_same_shapes_in_timm(name):
    pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    from varscale.encoder.names import timm_name
    from varscale.models.encoders import build_encoder

    shape = {"feature_dim": 0, "objective": "", "step": 0, "data_digest": "", "interpolation": "bilinear"}
    description = Description(name, None, 32, 16, mean=(0.0,) * 3, std=(1.0,) * 3, **shape)
    make = next(line for line in loading_code(description, "timm", "").splitlines() if line.startswith("model ="))
    with torch.device("meta"):
        ours = build_encoder(name, image_size=32, patch_size=16)
        names = {}
        exec(f"import timm\n{make}", names)
    expected = {key: tensor.shape for key, tensor in names["model"].state_dict().items()}
    assert {timm_name(key): tensor.shape for key, tensor in ours.state_dict().items()} == expected
