"""The benchmark of training steps: its table and JSON on a few images, and that the contenders do the same work."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from varscale.config import load_config

SMALL = ["--batch", "4", "--image-size", "16", "--stem", "imagenet", "--rounds", "1", "--steps", "1", "--warm-up", "1"]


@pytest.fixture(scope="module")
def tools_on_path(repository):
    sys.path.insert(0, str(repository / "tools"))  # as Python does for a script
    yield
    sys.path.remove(str(repository / "tools"))


@pytest.fixture(scope="module")
def bench(tool, tools_on_path):
    return tool("bench_train")


def run(repository, *arguments):
    """On one core, so that no thread waits for another that a busy machine does not run."""
    command = [sys.executable, repository / "tools" / "bench_train.py", *SMALL, *arguments]
    core = {min(os.sched_getaffinity(0))}
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=1500,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )


def rows(text):
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


def test_every_contender_has_a_row(repository, tmp_path):
    names = ["ours", "usual", "usual-amp", "supervised"]
    ended = run(repository, "--only", *names, "--rounds", 2, "--seconds", 0, "--json", tmp_path / "found.json")
    assert ended.returncode == 0, ended.stderr
    table = rows(ended.stdout)
    assert [row["step"] for row in table] == [
        "varscale",
        "the usual script",
        "the usual script",
        "supervised, cross-entropy",
    ]
    found = json.loads((tmp_path / "found.json").read_text())
    ours, usual, amp, floor = found["rows"]
    assert ours["views"] == usual["views"] == floor["views"] == 8
    assert found["rounds"] == len(ours["rounds"]) == len(floor["rounds"]) == 1  # no time was left for another
    assert floor["images_per_second"] == pytest.approx(floor["views_per_second"])
    assert ours["images_per_second"] == pytest.approx(ours["views_per_second"] / 2)
    if amp["absent"]:
        assert amp["absent"] == table[2]["images/s"] == "needs a GPU"
        assert usual["ratio"] == 1
        assert ours["ratio"] == pytest.approx(usual["step_seconds"] / ours["step_seconds"])
    assert all(0 <= row["data_wait"] <= 1 for row in (ours, usual, floor))
    assert found["flops_per_view"] > 0
    assert "64 raw images (64 different, up to 32 x 32), 10 classes" in ended.stdout


@pytest.mark.slow
def test_what_was_measured_survives_a_kill(tmp_path, killed_once_written):
    found = killed_once_written(
        "bench_train", *SMALL, "--only", "usual", "--rounds", 1000, "--json", tmp_path / "found.json"
    )
    assert found["rows"][0]["views_per_second"] > 0


@pytest.mark.parametrize("name", ["ours", "usual", "supervised"])
def test_as_many_views_pass_through_the_encoder_as_are_said_to(repository, tmp_path, name):
    """By a hook on its first convolution, in a process of its own."""
    code = f"""
import sys
sys.path[:0] = {[str(repository), str(repository / "tools")]}
from pathlib import Path
import bench_train, train_images
folder = Path({str(tmp_path)!r})
options = bench_train.parse_arguments({[*SMALL, "--count", "16", "--only", name]})
config = bench_train.load_config(options.config, bench_train.overrides_of(options, folder))
_, classes = train_images.write_training_images("cifar", 16, 10, folder, 1)
rows = bench_train.rows_of(options, config, folder)
with bench_train.CONTENDERS[{name!r}].open(bench_train.job_of(options, config, folder, classes)) as steps_of:
    from torch.nn.modules.module import register_module_forward_pre_hook
    counted = []
    register_module_forward_pre_hook(
        lambda module, inputs: counted.append(len(inputs[0])) if getattr(module, "in_channels", 0) == 3 else None
    )
    next(steps := steps_of(1))
    steps.close()
print("views", sum(counted), rows[0].views)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)
    assert "views 8 8" in ended.stdout, ended.stderr


@pytest.mark.slow
def test_ours_is_measured_compiled(repository, tmp_path):
    small = ["compute.compile=true", "encoder={name: vit_ti, patch_size: 8}", "--only", "ours", "--rounds", 2]
    ended = run(repository, *small, "--json", tmp_path / "found.json")
    assert ended.returncode == 0, ended.stderr
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["views"] == 8
    # What is timed is not compiled again.
    assert max(found["seconds"] for found in row["rounds"]) < 10


@pytest.mark.slow  # a minute on a busy machine
def test_a_setting_of_ours_is_varied_and_what_is_missing_says_how_to_get_it(repository, tmp_path, digits):
    blocked = tmp_path / "lightly"
    blocked.mkdir()
    (blocked / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'lightly'\", name='lightly')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        command = ["--data", digits, "--objective", "supcon", "--only", "ours", "lightly", "--vary"]
        ended = run(repository, *command, "compute.precision=float32", "--json", tmp_path / "found.json")
    assert ended.returncode == 0, ended.stderr
    ours, lightly, varied = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert lightly["absent"].startswith("lightly is not installed: pip install")
    assert (ours["overrides"], varied["overrides"]) == ([], ["compute.precision=float32"])
    assert varied["views"] == ours["views"] == 8


@pytest.mark.slow
def test_lightly_takes_part_where_it_is_installed(repository, tmp_path):
    for module in ("lightly", "lightning_utilities"):
        pytest.importorskip(module, reason="pip install --no-deps lightly==1.6.0 lightning-utilities")
    ended = run(repository, "--only", "lightly", "--json", tmp_path / "found.json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "found.json").read_text())["rows"][0]["views"] == 8


@pytest.mark.slow
def test_a_contender_that_fails_has_a_row_and_the_exit_code_tells(repository):
    ended = run(repository, "deepspeed.config=none.json", "--only", "ours")
    assert ended.returncode == 1
    (row,) = rows(ended.stdout)
    assert row["images/s"].startswith("failed: ")
    assert "none.json" in row["images/s"]


def test_the_ratio_is_of_views_a_second(bench):
    options = bench.parse_arguments(["--rounds", "3", "--steps", "2"])
    config = bench.load_config("cifar10-varcon")
    ours = bench.Row("ours", "", "", "bfloat16", views=64, rounds=[{"seconds": s, "waited": s / 4} for s in (4, 2, 8)])
    theirs = bench.Row("usual", "", "", "float16", views=32, rounds=[{"seconds": s, "waited": 0} for s in (6, 4, 8)])
    found = bench.figures(ours, theirs, options, config, 10**12, "a processor")
    assert found["step_seconds"] == 2
    assert found["step_seconds_range"] == [1, 4]
    assert found["views_per_second"] == found["tflops"] == 32
    assert found["data_wait"] == 0.25
    assert found["ratio"] == pytest.approx((3 / 32) / (2 / 64))
    assert found["ratio_range"] == pytest.approx([2, 4])
    assert "mfu" not in found


def test_mfu_is_a_share_of_what_the_device_does_in_the_rows_own_format(bench):
    options, config = bench.parse_arguments(["--steps", "1"]), bench.load_config("cifar10-varcon")

    def found(precision, device):
        row = bench.Row("ours", "", "", precision, views=100, rounds=[{"seconds": 1, "waited": 0}])
        return bench.figures(row, None, options, config, 10**12, device)

    for precision, device, peak, name in (
        ("bfloat16", "NVIDIA H100 80GB HBM3", 989.4, "bfloat16"),
        ("float16", "NVIDIA H100 80GB HBM3", 989.4, "bfloat16"),
        ("float32", "NVIDIA H100 80GB HBM3", 494.7, "TF32"),
        ("bfloat16", "NVIDIA A100-SXM4-40GB", 312.0, "bfloat16"),
    ):
        row = found(precision, device)
        assert row["peak"] == {"tflops": peak, "format": name}
        assert row["mfu"] == pytest.approx(100 / peak)


def test_every_row_has_its_precision_and_no_epoch_ends_in_a_round(bench, tmp_path):
    vary = ["--vary", "compute.precision=float32", "--vary", "batch.global_batch_size=64,512"]
    options = bench.parse_arguments(["--batch", "256", "--warm-up", "12", "--steps", "10", "--only", "ours", *vary])
    options.overrides = ["compute.precision=bfloat16"]
    assert options.count == (12 + 10 + 6) * 512
    rows = bench.rows_of(options, bench.load_config(options.config, bench.overrides_of(options, tmp_path)), tmp_path)
    assert [row.precision for row in rows] == ["bfloat16", "float32", "bfloat16", "bfloat16"]
    assert [row.views for row in rows] == [512, 512, 128, 1024]


@pytest.mark.parametrize(
    ("amx", "cuda", "said", "precision"),
    [
        (False, False, [], "float32"),
        (True, False, [], "bfloat16"),
        (False, True, [], "bfloat16"),
        (False, False, ["compute.precision=bfloat16"], "bfloat16"),
    ],
)
def test_ours_runs_in_the_format_that_a_run_advises(bench, monkeypatch, tmp_path, amx, cuda, said, precision):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(bench, "has_cuda", lambda: cuda)
    options = bench.parse_arguments([*SMALL, *said])
    overrides = bench.overrides_of(options, tmp_path)
    assert load_config(options.config, overrides).compute.precision == precision


@pytest.mark.slow
def test_ours_settles_each_step_as_training_does(repository, tmp_path):
    """The second step ends only when the first is known: a loss above the limit is found before the third begins."""
    ended = run(repository, "safety.loss_limit=0.000001", "--only", "ours", "--warm-up", 5)
    assert ended.returncode == 1
    (row,) = rows(ended.stdout)
    assert row["images/s"].startswith("failed: ")
    assert "step 1: " in row["images/s"]


def test_the_loss_of_the_usual_script_is_supcons(tools_on_path):
    import torch
    import train_contenders

    from varscale.objectives.supcon import supcon_loss

    features = torch.nn.functional.normalize(torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    ours, _ = supcon_loss(torch.cat(features.unbind(1)), labels.repeat(2), temperature=train_contenders.TEMPERATURE)
    torch.testing.assert_close(train_contenders.repeated_supcon(features, labels), ours)


def test_images_of_a_data_set_are_the_same_for_all(tools_on_path, digits, tmp_path):
    import train_images

    from varscale.data.beton import check_beton

    told, classes = train_images.write_training_images(str(digits), 50, 10, tmp_path, workers=1)
    assert told.startswith("50 raw images (50 different, up to 16 x 16)")
    labels, pixels = np.load(tmp_path / "labels.npy"), np.load(tmp_path / "images.npy")
    summary = check_beton(tmp_path / "converted" / "train.beton", num_classes=classes, require_labels=True)
    np.testing.assert_array_equal(summary.labels, labels)
    bytes_ = (tmp_path / "converted" / "train.beton").read_bytes()
    for index in (0, 49):
        start = int(summary.offsets[index])
        assert bytes_[start : start + pixels[index].size] == pixels[index].tobytes()
    original = check_beton(digits / "train.beton", num_classes=None, require_labels=True)
    assert labels[-1] == original.labels[-1]  # evenly spread, to the last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["objective.name=byol"], "the usual script knows varcon, supcon, simclr"),
        (["data.local_views=2"], "the contenders make two views"),
        (["--vary", "batch.size=3"], "unknown key 'batch.size'"),
        (["--data", "nothing"], "nothing holds no converted data set"),
    ],
)
def test_bad_input_is_one_sentence(bench, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert bench.main(["--count", "16", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
