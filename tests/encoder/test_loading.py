"""`varscale.load_encoder` of runs, checkpoints and exported files; and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import RESNET, VIT, make_run

import varscale
from varscale.data.dataset import read_dataset_info
from varscale.errors import UserError
from varscale.export import export_encoder

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 20, 17, 3), dtype=np.uint8)


@pytest.mark.parametrize("encoder", [RESNET, VIT])
def test_runs_checkpoints_and_files_give_the_same_features(tmp_path, data, encoder):
    _, network = make_run(tmp_path / "run", data, *encoder)
    for names in ("torchvision", "timm"):
        export_encoder(tmp_path / "run", tmp_path / f"{names}.safetensors", names=names)
    loaded = varscale.load_encoder(str(tmp_path / "run"))
    expected = loaded(loaded.preprocess(IMAGES))
    assert expected.shape == (3, loaded.feature_dim)
    # Not to the bit: without gradients torch takes a fused attention.
    torch.testing.assert_close(expected, network(loaded.preprocess(IMAGES)).detach(), rtol=1e-4, atol=1e-5)
    for path in ("run/checkpoints/latest", "torchvision.safetensors", "timm.safetensors"):
        other = varscale.load_encoder(tmp_path / path)
        assert other.description == loaded.description
        assert torch.equal(other(other.preprocess(IMAGES)), expected), path


def test_it_is_frozen_and_takes_images_from_anywhere(tmp_path, data):
    make_run(tmp_path / "run", data)
    encoder = varscale.load_encoder(tmp_path / "run", device="cpu").double()
    features = encoder(encoder.preprocess(IMAGES))
    assert features.dtype == torch.float64
    assert not features.requires_grad
    assert not any(module.training for module in encoder.modules())
    info = read_dataset_info(data[0])
    assert (encoder.preprocess.mean, encoder.preprocess.std) == (info.mean, info.std)


def test_loading_leaves_the_callers_random_numbers_alone(tmp_path, data):
    make_run(tmp_path / "run", data)
    export_encoder(tmp_path / "run", tmp_path / "e.safetensors")
    torch.manual_seed(0)
    expected = torch.rand(1)
    for path in ("run", "e.safetensors"):
        torch.manual_seed(0)
        varscale.load_encoder(tmp_path / path)
        assert torch.equal(torch.rand(1), expected)


def test_a_run_whose_data_was_moved_is_told_where_it_lies(tmp_path, data):
    make_run(tmp_path / "run", (tmp_path / "gone", data[1]))
    with pytest.raises(UserError, match=r"data= in Python"):
        varscale.load_encoder(tmp_path / "run")
    assert varscale.load_encoder(tmp_path / "run", data=data[0]).preprocess.mean == read_dataset_info(data[0]).mean


def test_what_is_no_encoder_is_refused(tmp_path, data):
    make_run(tmp_path / "run", data)
    export_encoder(tmp_path / "run", tmp_path / "e.safetensors")
    tensors = load_file(tmp_path / "e.safetensors")
    with safe_open(tmp_path / "e.safetensors", framework="pt") as file:
        header = file.metadata()

    def refusal(name):
        with pytest.raises(UserError) as refused:
            varscale.load_encoder(tmp_path / name)
        assert name in str(refused.value)
        return str(refused.value)

    assert "nearest" in refusal("rum")
    (tmp_path / "text.safetensors").write_text("nothing")
    assert "cannot be read as a .safetensors file" in refusal("text.safetensors")
    assert "cannot be read as a .safetensors file (No such file" in refusal("nowhere.safetensors")
    (tmp_path / "e.onnx").write_text("nothing")
    assert "onnxruntime.InferenceSession" in refusal("e.onnx")
    save_file(tensors, tmp_path / "bare.safetensors")
    assert "its header does not say name, stem" in refusal("bare.safetensors")
    faults = {
        "name": ("resnet19", "'resnet19' is none of"),
        "names": ("keras", "header is damaged"),
        "mean": ("[0.1,", "header is damaged"),
        "stem": ("imagenet", r"conv1.weight has shape (64, 3, 3, 3) instead of (64, 3, 7, 7)"),
    }
    for key, (value, expected) in faults.items():
        save_file(tensors, tmp_path / f"{key}.safetensors", header | {key: value})
        assert expected in refusal(f"{key}.safetensors")


def test_importing_varscale_is_light_and_foreign_names_are_unknown():
    check = (
        "import sys, varscale\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert callable(varscale.load_encoder) and 'torch' in sys.modules\n"
        "assert 'deepspeed' not in sys.modules and 'ffcv' not in sys.modules\n"
        "varscale.load_decoder\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=100)
    assert "AttributeError: module 'varscale' has no attribute 'load_decoder'" in done.stderr
