"""The program that exports an encoder: the files it writes, and what it refuses."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import make_data, make_run

from varscale.export import export_encoder, main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return make_data(tmp_path_factory.mktemp("data"))


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
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "e.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode  # others may read it


def test_the_card_lies_beside_it_and_tells_how_to_load_it(tmp_path, data, capsys):
    make_run(tmp_path / "run", data)
    for names, line in {"torchvision": "torchvision.models.resnet18()", "timm": 'timm.create_model("resnet18"'}.items():
        out = tmp_path / f"{names}.safetensors"
        assert main(["--checkpoint", str(tmp_path / "run"), "--out", str(out), "--names", names]) == 0
        assert f"model card {out}.md" in capsys.readouterr().out
        card = (tmp_path / f"{names}.safetensors.md").read_text()
        assert line in card
        assert f'load_file("{out.name}")' in card
        assert "model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)" in card


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


def test_an_existing_card_stays_unless_told_otherwise(tmp_path, data, capsys):
    make_run(tmp_path / "run", data)
    card = tmp_path / "e.safetensors.md"
    card.write_text("with the data's licence")
    arguments = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "e.safetensors")]
    assert main(arguments) == 2
    assert f"{card} exists already; add --overwrite" in capsys.readouterr().err
    assert card.read_text() == "with the data's licence"
    assert not (tmp_path / "e.safetensors").exists()
    assert main([*arguments, "--overwrite"]) == 0
    assert card.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("run", "out", "expected"),
    [
        ("rum", "e.safetensors", "no such run; nearest:"),
        ("run", "nowhere/e.safetensors", "the folder"),
        ("run", ".", "exists already"),
        ("run", "e.pt", "its suffix is '.pt', but must be .safetensors or .onnx"),
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


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, data, small_disk, capsys):
    make_run(tmp_path / "run", data)
    assert main(["--checkpoint", str(tmp_path / "run"), "--out", str(small_disk / "e.safetensors")]) == 2
    assert "e.safetensors: cannot be written" in capsys.readouterr().err
    assert list(small_disk.iterdir()) == []


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


def test_names_belong_to_safetensors(tmp_path, data, capsys):
    make_run(tmp_path / "run", data)
    arguments = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "e.onnx"), "--names", "timm"]
    assert main(arguments) == 2
    assert "--names timm: belongs to a .safetensors file" in capsys.readouterr().err
