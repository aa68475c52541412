"""The conversion as a person runs it: its summary, its one-line errors, and what is left after Ctrl-C or a kill."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from varscale.data.dataset import check_beton, read_dataset_info

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_dataset.py"


@pytest.fixture(scope="module")
def main(tool):
    return tool("convert_dataset").main


@pytest.fixture
def archive(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"x_{split}": rng.integers(0, 256, (40, 20, 30, 3), np.uint8) for split in ("train", "test")}
    labels = {f"y_{split}": np.arange(40) % 4 for split in ("train", "test")}
    np.savez(tmp_path / "x.npz", **arrays, **labels)
    return f"npz:{tmp_path / 'x.npz'}"


def image_folder(root, per_class, bad=0, size=(500, 400)):
    """Class folders of links to one JPEG, and `bad` files that are none."""
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(buffer, "JPEG")
    root.mkdir(parents=True)
    (root / "one.jpg").write_bytes(buffer.getvalue())
    for split, count in (("train", per_class), ("val", 2)):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                (root / split / name / f"{index}.jpg").hardlink_to(root / "one.jpg")
    for index in range(bad):
        (root / "train" / "bee" / f"bad{index:03}.jpg").write_text("not an image")
    return f"imagefolder:{root}"


def run(*arguments, cwd):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_digits_from_any_folder(tmp_path):
    result = run("digits", "out", "--workers", 2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    info = read_dataset_info(tmp_path / "out")
    assert info.image_sizes["train"]["max_width"] == 32
    assert info.options["image_size"] == 32
    assert f"digest {info.digest}" in result.stdout
    assert f"train  {info.num_samples('train'):,} images" in result.stdout
    assert "next: deepspeed varscale/train.py --config digits-varcon data.dir=out" in result.stdout
    assert re.search(r"[\d,.]+ MB/s written", result.stderr)
    assert re.search(r"converted 1,797 images in [\d.]+ s: [\d,]+ images/s, [\d,.]+ MB/s written\n", result.stdout)
    for split in ("train", "val"):
        summary = check_beton(tmp_path / "out" / f"{split}.beton", num_classes=10, require_labels=True)
        assert summary.num_samples == info.num_samples(split)
        np.testing.assert_array_equal(np.bincount(summary.labels), info.counts[split])


def test_help_tells_how_images_are_stored(tmp_path):
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0
    for word in ("imagefolder:DIR", "--skip-bad", "byte for byte", "lossless", "64x64"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits"], "the following arguments are required: OUT_DIR"),
        (["digitz", "out"], r"unknown source 'digitz' \(did you mean digits\?\)"),
        (["digits", "out", "--image-size", "24"], "argument --image-size: invalid choice: 24"),
        (["digits", "out", "--jpeg-quality", "101"], "argument --jpeg-quality: '101' is not a whole number from 1 to"),
        (["digits", "out", "--max-resolution", "0"], "argument --max-resolution: '0' is not a whole number from 1 to"),
        (["digits", "out", "--per-class", "3"], "argument --per-class: '3' is not two whole numbers above 0, as in"),
        (["digits", "out", "--workers", "two"], "argument --workers: 'two' is not a whole number"),
        (["digits", "out", "--skipbad"], "unrecognized arguments: --skipbad"),
        (["npz:none.npz", "out"], r"cannot read none\.npz: No such file or directory"),
        (["imagefolder:none", "out"], "cannot read the folder none: No such file or directory"),
        (["digits", "taken"], r"taken exists and holds other files \(mine\.txt\)"),
        (["digits", "taken", "--overwrite"], r"taken exists and holds other files \(mine\.txt\)"),
        (["digits", "taken/mine.txt"], r"taken/mine\.txt is a file"),
        (["digits", "taken/mine.txt/out"], r"taken/mine\.txt/out cannot be made: .*mine\.txt is a file"),
    ],
)
def test_bad_usage_is_one_line_and_leaves_nothing(main, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert re.fullmatch(f"convert_dataset.py: .*{message}.*\n", output.err)
    assert output.out == ""
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["taken", "mine.txt"]


def test_a_taken_folder_is_refused_before_the_source_is_opened(main, archive, tmp_path, capsys):
    assert main([archive, str(tmp_path / "out"), "--workers", "1"]) == 0
    assert main(["npz:none.npz", str(tmp_path / "out")]) == 2
    assert "already holds a data set: pass --overwrite" in capsys.readouterr().err
    assert main([archive, str(tmp_path / "out"), "--workers", "1", "--overwrite"]) == 0


def test_options_reach_the_stored_images(main, archive, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([archive, str(out), "--workers", "1", "--max-resolution", "15", "--jpeg-quality", "80"]) == 0
    info = read_dataset_info(out)
    assert info.image_sizes["val"] == {"min_height": 10, "max_height": 10, "min_width": 15, "max_width": 15}
    assert info.options == {"max_resolution": 15, "jpeg_quality": 80}
    assert "40 images, 10 a class, 15 x 10 pixels" in capsys.readouterr().out


def test_bad_files_are_named_then_skipped(main, tmp_path, capsys):
    source, out = image_folder(tmp_path / "in", 3, bad=25, size=(40, 30)), tmp_path / "out"
    assert main([source, str(out), "--workers", "1"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("not a JPEG or PNG image") == 20
    assert "train/bee/bad000.jpg: not a JPEG or PNG image" in errors
    assert "and 5 more" in errors
    assert re.search(
        r"convert_dataset.py: imagefolder:.*: 25 of 35 images cannot be decoded.*--skip-bad; 35 of 35 images are kept",
        errors,
    )
    assert not out.exists()

    assert main([source, str(out), "--workers", "1", "--fresh"]) == 2
    assert "note" not in capsys.readouterr().err
    assert main([source, str(out), "--workers", "1", "--skip-bad"]) == 0
    output = capsys.readouterr()
    assert "note: going on after 35 of 35 images" in output.err
    assert "skipped 25 undecodable images, named in" in output.out
    assert len((out / "skipped.txt").read_text().splitlines()) == 25
    assert read_dataset_info(out).skipped == 25


def test_verification_after_the_conversion_and_later(main, archive, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([archive, str(out), "--workers", "1", "--verify"]) == 0
    assert re.search(r"\nverified 80 images in .* MB/s read; digest [0-9a-f]{64}\n$", capsys.readouterr().out)
    assert main(["verify", str(out), "--workers", "2"]) == 0
    path = out / "train.beton"
    content = bytearray(path.read_bytes())
    content[-80 * 24 - 1000] ^= 1
    path.write_bytes(content)
    assert main(["verify", str(out)]) == 2
    output = capsys.readouterr()
    assert re.search(r"out is damaged, convert it again:\n  .*their digest differs\n$", output.err)
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no converted data set" in capsys.readouterr().err


def test_inspection_tells_and_draws(main, archive, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([archive, "out", "--workers", "1"]) == 0
    assert main(["inspect", "out", "--rows", "3", "--views", "2"]) == 0
    output = capsys.readouterr().out
    assert "train    40 images, 10 a class, 30 x 20 pixels, 40 raw" in output
    assert output.endswith("\nviews    out-views.png\n")
    options = ["--config", "cifar10-vssl", "--augmentation", "simclr", "--rows", "3", "--views", "2"]
    assert main(["inspect", "out/val.beton", *options, "--out", "other.png"]) == 0
    own, recipe = (Image.open(name).size for name in ("out-views.png", "other.png"))
    assert own[0] != recipe[0]  # views of 30 pixels, the data's, and of 32, the recipe's
    options = ["--config", "cifar10-vssl", "--rows", "3"]
    assert main(["inspect", "out", *options, "--out", "as-trained.png"]) == 0
    assert Image.open("as-trained.png").width == recipe[0]  # the recipe's two views
    capsys.readouterr()
    assert main(["inspect", "out", "--augmentation", "simcrl"]) == 2
    assert "invalid choice: 'simcrl'" in capsys.readouterr().err
    assert main(["inspect", "out", "--config", "cifar10"]) == 2
    assert main(["inspect", "out", "--out", "none/x.png"]) == 2
    assert "cannot write none/x.png: No such file" in capsys.readouterr().err


def test_ignored_files_are_told(main, tmp_path, capsys):
    source = image_folder(tmp_path / "in", 3, size=(40, 30))
    (tmp_path / "in" / "train" / "ant" / "a.webp").write_text("x")
    assert main([source, str(tmp_path / "out"), "--workers", "1"]) == 0
    output = capsys.readouterr()
    assert "note: ignored 1 files that are not .jpg, .jpeg or .png: 1 .webp" in output.err
    assert "stored 10 JPEG kept" in output.out


@pytest.fixture
def running(tmp_path):
    """A conversion of some seconds, by two worker processes, in the middle of its work."""
    source = image_folder(tmp_path / "in", 1000)
    command = [sys.executable, str(TOOL), source, str(tmp_path / "new" / "out"), "--workers", "2"]
    # Tests that a shell runs in the background inherit that Ctrl-C is ignored.
    options = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options) as process:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size > 2**23 for path in tmp_path.glob("new/.out.partial/result/train.beton")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
        process.kill()


def assert_goes_on(running, errors, tmp_path):
    """What `errors` says is kept is where the same command, given again, goes on."""
    kept = re.search(r"; ([\d,]+) of 2,004 images are kept in .*/new/\.out\.partial; the same command goes on", errors)
    assert kept, errors
    assert os.listdir(tmp_path / "new") == [".out.partial"]
    again = subprocess.run(running.args, capture_output=True, text=True, timeout=120)
    assert f"note: going on after {kept[1]} of 2,004 images\n" in again.stderr
    assert read_dataset_info(tmp_path / "new" / "out").num_samples("train") == 2000
    assert os.listdir(tmp_path / "new") == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_tells_what_it_keeps(running, tmp_path, number):
    if number == signal.SIGINT:
        os.killpg(running.pid, number)  # a terminal's Ctrl-C reaches the workers, too
    else:
        running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "convert_dataset.py: interrupted; " in errors
    assert "Traceback" not in errors
    assert_goes_on(running, errors, tmp_path)


def children(process_id):
    """The living processes that the process started."""
    return [int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


def is_running(process_id):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process_id}/status").read_text()
    except FileNotFoundError:
        return False


def test_workers_end_with_a_killed_conversion(running):
    started = children(running.pid)
    assert len(started) >= 2
    running.kill()
    deadline = time.monotonic() + 20
    while any(is_running(process_id) for process_id in started):
        assert time.monotonic() < deadline, "worker processes outlive the conversion"
        time.sleep(0.05)


def test_workers_killed_while_they_write_are_told(running, tmp_path):
    """They wait in the middle of a result, since the process that reads it is held."""
    workers = [child for child in children(running.pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    running.send_signal(signal.SIGSTOP)
    time.sleep(2)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    running.send_signal(signal.SIGCONT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 2
    assert "convert_dataset.py: a worker process died" in errors
    assert "Traceback" not in errors
    assert_goes_on(running, errors, tmp_path)
