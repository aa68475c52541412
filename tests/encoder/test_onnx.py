"""The ONNX file, computed by onnxruntime; and what is said where it cannot be made."""

import importlib.util

import numpy as np
import pytest
import torch
from small_runs import RESNET, VIT, make_run

from varscale.encoder.onnx import OPSET, PACKAGES, onnx_difference
from varscale.export import main

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason=f"ONNX is not installed: pip install {' '.join(PACKAGES)}",
)


@needs_onnx
@pytest.mark.parametrize("encoder", [RESNET, VIT])
def test_onnxruntime_computes_the_features_of_any_number_of_images(tmp_path, data, monkeypatch, capsys, encoder):
    import onnx

    _, network = make_run(tmp_path / "run", data, *encoder)
    assert main(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "e.onnx")]) == 0
    printed = capsys.readouterr().out
    difference = float(printed.split("difference")[1].split()[0])
    assert 0 < difference < 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.onnx", "e.onnx.md", "run"]
    model = onnx.load(tmp_path / "e.onnx")
    assert [opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")] == [OPSET]
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["data_digest"] == data[1]
    code = (tmp_path / "e.onnx.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    for count in (1, 7):
        images = np.random.default_rng(count).normal(size=(count, 3, 16, 16)).astype(np.float32)
        names = {"images": images}
        exec(code, names)
        torch.testing.assert_close(
            torch.from_numpy(names["features"]), network(torch.from_numpy(images)).detach(), rtol=1e-4, atol=1e-4
        )
    with torch.no_grad():
        first = next(network.parameters())
        first.add_(torch.randn(first.shape, generator=torch.Generator().manual_seed(0)))
    other, largest = onnx_difference(network, 16, tmp_path / "e.onnx")
    assert other > max(100 * difference, 0.01 * largest)


@needs_onnx
def test_where_the_features_differ_nothing_is_kept(tmp_path, data, monkeypatch, capsys):
    make_run(tmp_path / "run", data)
    monkeypatch.setattr("varscale.export.TOLERANCE", 0.0)
    assert main(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "e.onnx")]) == 2
    assert "onnxruntime's features differ from torch's by up to" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_missing_packages_are_named_with_the_command_to_give(tmp_path, data, monkeypatch, capsys):
    make_run(tmp_path / "run", data)
    find = importlib.util.find_spec
    hidden = {"onnxscript", "onnxruntime"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))
    assert main(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "e.onnx")]) == 2
    assert "onnxruntime, not installed here: pip install" in capsys.readouterr().err
    assert not (tmp_path / "e.onnx").exists()
