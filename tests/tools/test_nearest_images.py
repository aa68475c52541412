"""The nearest training images: that they are the nearest, that the sheet shows them, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import make_run

from varscale.data.conversion import convert
from varscale.data.dataset import read_dataset_info
from varscale.data.sources import open_source

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 230)}
TRAIN, VAL = 12, 6


@pytest.fixture(scope="module")
def tool_module(tool):
    return tool("nearest_images")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noisy images of three colours, a class each, in turn."""
    folder = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", TRAIN), ("test", VAL)):
        labels = np.arange(count) % 3
        noise = random.integers(-30, 30, (count, 16, 16, 3))
        images = np.array(list(COLOURS.values()))[labels][:, None, None] + noise
        arrays |= {f"x_{split}": images.clip(0, 255).astype(np.uint8), f"y_{split}": labels}
    np.savez(folder / "a.npz", **arrays, names=list(COLOURS))
    convert(open_source(f"npz:{folder / 'a.npz'}"), folder / "data")
    return folder / "data", read_dataset_info(folder / "data").digest


@pytest.fixture
def arguments(tmp_path, data):
    make_run(tmp_path / "run", data)
    out = tmp_path / "nearest.png"
    return ["--checkpoint", str(tmp_path / "run"), "--data", str(data[0]), "--k", "4", "--out", str(out)]


def test_each_query_is_drawn_beside_the_images_of_its_colour(tool_module, tmp_path, data, arguments, capsys):
    Image.new("RGB", (50, 30), COLOURS["green"]).save(tmp_path / "photo.jpg")
    assert tool_module.main([*arguments, "--query", "2", str(tmp_path / "photo.jpg")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("validation 2 (blue): blue ")
    assert [name.split()[0] for name in lines[0].split(": ")[1].split(", ")] == ["blue"] * 4
    assert [name.split()[0] for name in lines[1].removeprefix("photo.jpg: ").split(", ")] == ["green"] * 4
    similarities = [float(name.split()[1]) for name in lines[0].split(": ")[1].split(", ")]
    assert similarities == sorted(similarities, reverse=True)
    sheet = np.asarray(Image.open(tmp_path / "nearest.png").convert("RGB")).astype(int)
    first, pitch = tool_module.MARGIN + 34, tool_module.CELL + tool_module.CAPTION + 2 * tool_module.GAP
    half = tool_module.CELL // 2
    left = tool_module.MARGIN + tool_module.CELL + 4 * tool_module.GAP
    for row, colour in enumerate(("blue", "green")):
        for x in (tool_module.MARGIN, left, left + 3 * (tool_module.CELL + tool_module.GAP)):
            y = first + row * pitch
            seen = sheet[y + half - 16 : y + half + 16, x + half - 16 : x + half + 16].mean((0, 1))
            assert np.abs(seen - COLOURS[colour]).max() < 15


def test_similarities_are_the_cosines_of_the_encoders_features(tool_module, data, arguments):
    import varscale
    from varscale.data.inspection import open_contents

    contents = open_contents(data[0])
    encoder = varscale.load_encoder(arguments[1])
    query = tool_module.open_query("3", contents)
    (found,) = tool_module.nearest(encoder, [query], contents, TRAIN)
    assert sorted(neighbour.index for neighbour in found) == list(range(TRAIN))
    train = [tool_module.stored_image(contents.betons["train"], contents.summaries["train"], n.index) for n in found]
    prepare = encoder.preprocess
    expected = torch.cosine_similarity(encoder(prepare(query.image)), encoder(prepare(train)))
    torch.testing.assert_close(torch.tensor([n.similarity for n in found]), expected, rtol=0, atol=1e-4)


def test_an_exported_file_searches_as_well(tool_module, tmp_path, arguments):
    from varscale.export import export_encoder

    export_encoder(tmp_path / "run", tmp_path / "e.safetensors")
    assert tool_module.main([*arguments, "--query", "0"]) == 0
    expected = (tmp_path / "nearest.png").stat().st_size
    assert tool_module.main([*arguments, "--checkpoint", str(tmp_path / "e.safetensors"), "--query", "0"]) == 0
    assert (tmp_path / "nearest.png").stat().st_size == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--query", "6"], "--query 6: "),
        (["--query", "6"], "holds samples 0 to 5"),
        (["--query", "-1"], "holds samples 0 to 5"),
        (["--query", "photo.jpg"], "there is no such file"),
        (["--query", __file__], "is not an image"),
        (["--query", "."], "cannot be read (Is a directory)"),
        (["--query", "0", "--k", "0"], "--k is 0, but must be from 1 to 12"),
        (["--query", "0", "--k", "13"], "--k is 13, but must be from 1 to 12"),
        (["--query", "0", "--out", "nearest.jpg"], "must be .png"),
        (["--query", "0", "--out", "nowhere/nearest.png"], "the folder nowhere does not exist"),
        (["--query", "0", "--data", "nowhere"], "--data nowhere: there is no such folder"),
        (["--query", "0", "--checkpoint", "nowhere"], "nowhere: there is no such run"),
    ],
)
def test_mistakes_are_told_in_one_line(tool_module, tmp_path, arguments, capsys, changes, expected):
    assert tool_module.main([*arguments, *changes]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert expected in message
    assert not (tmp_path / "nearest.png").exists()


def test_a_damaged_image_is_refused(tool_module, tmp_path, arguments, capsys):
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    assert tool_module.main([*arguments, "--query", str(tmp_path / "cut.png")]) == 2
    assert "cut.png: cannot be read" in capsys.readouterr().err
