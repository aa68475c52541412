"""The benchmark of loaders: its table, on a few images, and its refusal of loaders that do less than they claim."""

import subprocess
import sys

import numpy as np
import pytest


@pytest.fixture(scope="module")
def bench(tool, repository):
    sys.path.insert(0, str(repository / "tools"))  # as Python does for a script
    try:
        return tool("bench_loader")
    finally:
        sys.path.pop(0)


def run(repository, *arguments):
    command = [sys.executable, repository / "tools" / "bench_loader.py", "--rounds", 1, "--cores", 1, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


def rows(ended):
    assert ended.returncode == 0, ended.stderr
    rates = ended.stdout.split("\n\n|  |")[0]
    table = [line.strip("| ").split(" | ") for line in rates.splitlines() if line.startswith("| ")]
    assert {len(row) for row in table} == {7}
    for row in table[1:]:
        low, high = row[4].split(" - ")
        assert row[3] == low == high  # one round
        assert float(low.replace(",", "")) > 0
    return table[1:]


@pytest.mark.slow
def test_every_loader_of_jpegs_has_a_row(repository):
    names = ["ours", "ffcv", "torchvision", "ours-colour", "pil-colour", "decoding"]
    ended = run(repository, "--count", 6, "--batch-size", 3, "--size", 32, "--only", *names)
    table = rows(ended)
    assert [row[1] for row in table] == ["crop, flip"] * 3 + ["crop, flip, colour"] * 2 + ["one decode"]
    assert [row[5] == "1.00" for row in table] == [True, False, False, True, False, False]
    assert table[-1][5:] == ["-", "100%"]
    assert "6 JPEG images (6 different), 500 x 375" in ended.stdout
    assert "python tools/bench_loader.py --rounds 1" in ended.stdout


def test_what_was_measured_survives_a_kill(repository, tmp_path, killed_once_written):
    small = ["--images", "cifar", "--count", 8, "--batch-size", 4, "--cores", 1, "--rounds", 1000, "--only", "ours"]
    found = killed_once_written("bench_loader", *small, "--json", tmp_path / "rates.json")
    assert "8 raw images" in found["images"]
    (row,) = found["rates"]
    assert (row["loader"], row["cores"]) == ("ours", 1)
    assert row["images_per_second"][0] > 0


def test_the_ratios_aimed_at_are_those_of_the_medians(bench):
    rates = {("ours", 2): [50, 60, 900], ("ffcv", 2): [20, 20, 1], ("decoding", 2): [100], ("ours", 1): [30]}
    rates |= {("pil-colour", 1): [4], ("ours-colour", 1): [10]}
    rows = [line.strip("| ").split(" | ") for line in bench.aims(rates).splitlines()]
    assert rows[0][-2:] == ["1 core", "2 cores"]
    assert [row[1:] for row in rows[2:]] == [
        ["2.5", "-", "3.0"],
        ["2.8", "-", "-"],
        ["6.0", "7.5", "-"],
        ["60%", "-", "60%"],
        ["2.5", "2.5", "-"],
    ]


def test_raw_images_of_an_archive(repository, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "x.npz", x_train=images, y_train=[0, 1, 0, 1], x_test=images, y_test=[0, 1, 0, 1])
    archive = tmp_path / "x.npz"
    ended = run(
        repository, "--images", archive, "--count", 6, "--batch-size", 2, "--only", "ours", "torchvision", "dali"
    )
    assert [row[0] for row in rows(ended)] == ["varscale", "DataLoader, torchvision on tensors"]
    assert "6 raw images (4 different), 32 x 32, 3 KB each" in ended.stdout
    assert "--images x.npz" in ended.stdout
    assert str(tmp_path) not in ended.stdout


def good(job):
    rng = np.random.default_rng(0)
    for indices in job.order:
        yield list(rng.integers(0, 256, (job.views, len(indices), job.size, job.size, 3), np.uint8))


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (good, None),
        (lambda job: list(good(job))[1:], "4 batches, not 5"),
        (lambda job: (views[1:] for views in good(job)), "1 views, not 2"),
        (lambda job: ([view[1:] for view in views] for views in good(job)), r"shape \(2, 8, 8, 3\)"),
        (lambda job: ([view[:, 1:] for view in views] for views in good(job)), r"shape \(3, 7, 8, 3\)"),
        (lambda job: ([view / 255 for view in views] for views in good(job)), "type float64"),
        (lambda job: (views[:1] * 2 for views in good(job)), "same view twice"),
    ],
)
def test_other_views_than_asked_for_are_refused(bench, monkeypatch, tmp_path, stream, message):
    monkeypatch.setitem(bench.CONTENDERS, "ours", bench.CONTENDERS["ours"]._replace(stream=stream))
    job = bench.Job(bench.Images(tmp_path), np.arange(15).reshape(5, 3), views=2, size=8, cores=1)
    if message is None:
        assert len(list(bench.checked("ours", job))) == 5
        return
    with pytest.raises(SystemExit, match=message):
        list(bench.checked("ours", job))


def test_what_is_not_installed_is_left_out_and_named(bench, monkeypatch, capsys):
    monkeypatch.setitem(bench.CONTENDERS, "dali", bench.CONTENDERS["dali"]._replace(module="no_such.module"))
    assert not bench.takes_part("dali", arrays=False)
    assert "pip install nvidia-dali-cuda120" in capsys.readouterr().err
    assert bench.takes_part("ours", arrays=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nothing"], "nothing holds no .jpg, .jpeg or .png file"),
        (["--images", "nothing.tar"], "cannot extract nothing.tar"),
        (["--images", "nothing.npz"], "cannot read nothing.npz"),
        (["--images", "cifar", "--count", "2", "--batch-size", "3"], "--batch-size 3 must lie between 1 and --count 2"),
        (["--images", "cifar", "--cores", "0"], "--cores must lie between 1 and"),
    ],
)
def test_bad_input_is_one_sentence(bench, monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert bench.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
