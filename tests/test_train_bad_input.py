"""Every mistake in the input ends with exit code 2 and one line, before torch is loaded, and leaves nothing behind."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from varscale import train
from varscale.config import OBJECTIVES, load_config, resolve_batch
from varscale.data.beton import FIELD, HEADER, SAMPLE, check_beton
from varscale.data.dataset import read_dataset_info
from varscale.engine.checkpoints import write_checkpoint
from varscale.engine.launch import check_run_directory, check_training_data
from varscale.engine.manifest import write_manifest
from varscale.errors import UserError

FAST = ["online_knn.every_epochs=0"]


@pytest.fixture
def data(digits, tmp_path):
    """A copy of the data set that a test may damage."""
    return shutil.copytree(digits, tmp_path / "data")


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Call train.py's main; return its one line of complaint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("varscale.engine.distributed.join", lambda _: pytest.fail("the run was started"))

    def call(*arguments: str, recipe: str = "digits-varcon") -> str:
        before = sorted(tmp_path.rglob("*"))
        assert train.main(["--config", recipe, *arguments]) == 2
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return call


def test_unknown_recipe(refused):
    assert "nearest: digits-varcon" in refused(recipe="digit-varcon")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; nearest: optimizer.lr"),
        ("encoder.name=resnet19", "nearest: resnet18"),
        ("deepspeed.config=zero9", "nearest: zero"),
        ("objective.epsilon=0.1", "objective.epsilon is 0.1, but it must be smaller than objective.temperature"),
        ("batch.micro_batch_size=48", "= 48, but global_batch_size is 64"),
    ],
)
def test_configuration(refused, data, override, message):
    assert message in refused(f"data.dir={data}", override)


def test_data_set_not_converted(refused, tmp_path):
    assert "holds no converted data set" in refused(f"data.dir={tmp_path / 'nowhere'}")


def test_missing_beton(refused, data):
    (data / "val.beton").unlink()
    assert "val.beton does not exist" in refused(f"data.dir={data}")


@pytest.mark.parametrize("kept", [0, 10, 1000, 0.5, 0.999])
def test_truncated_beton(refused, data, kept):
    path = data / "train.beton"
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert "train.beton" in refused(f"data.dir={data}")


def write_beton(path, with_labels: bool, labels=range(40)):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = np.zeros((16, 16, 3), np.uint8)
    fields = {"image": RGBImageField()} | ({"label": IntField()} if with_labels else {})
    samples = [(image, int(label)) if with_labels else (image,) for label in labels]
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(samples)


def with_counts(data, count):
    """Make dataset.json describe `count` training images."""
    path = data / "dataset.json"
    info = json.loads(path.read_text())
    info["counts"]["train"] = [count] + [0] * (len(info["classes"]) - 1)
    path.write_text(json.dumps(info))


def test_help_names_every_objective(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ", ".join(OBJECTIVES) in said


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_supervised_objectives_refuse_data_without_labels(refused, data, capsys, objective):
    write_beton(data / "train.beton", with_labels=False)
    with_counts(data, 40)
    capsys.readouterr()
    overrides = [f"data.dir={data}", "batch.global_batch_size=40"]
    if objective in ("varcon", "supcon", "cross_entropy"):
        complaint = refused(*overrides, recipe=f"digits-{objective}")
        assert "objectives that need none: vssl, simclr, byol, mocov3" in complaint
    else:
        config = load_config(f"digits-{objective}", overrides)
        assert not check_training_data(config, resolve_batch(config.batch, 1)).labelled


def test_labels_outside_the_classes(refused, data, capsys):
    write_beton(data / "train.beton", with_labels=True, labels=[0, 1, 10])
    with_counts(data, 3)
    capsys.readouterr()
    path = data / "train.beton"
    name = (data / "train.names.txt").read_text().splitlines()[2]
    for choice in ("stop", "skip"):  # a wrong label is no damage to be passed over
        message = refused(f"data.dir={data}", f"data.on_bad_sample={choice}")
        assert f"{path}: sample 2 ({name}) has label 10, but the data set has 10 classes" in message


def test_labels_within_the_classes_that_were_changed(refused, data):
    labels = check_beton(data / "train.beton", num_classes=None, require_labels=True).labels
    sample = int(np.flatnonzero(labels == 3)[0])
    start = HEADER.itemsize + 2 * FIELD.itemsize + sample * SAMPLE.itemsize + SAMPLE.fields["label"][1]
    with (data / "train.beton").open("r+b") as file:
        file.seek(start)
        file.write(np.int64(4).tobytes())
    count = int((labels == 3).sum())
    message = refused(f"data.dir={data}")
    assert f"holds {count - 1} images of class '3' (label 3), but dataset.json describes {count}" in message


def test_a_beton_of_another_size_than_described(refused, data):
    with_counts(data, 7)
    assert "holds 320 images, but dataset.json describes 7" in refused(f"data.dir={data}")


def test_fewer_samples_than_one_global_batch(refused, data):
    message = refused(f"data.dir={data}", "batch.global_batch_size=512")
    assert "global_batch_size is 512" in message
    assert "holds only 320 images" in message


def test_a_cache_larger_than_memory(refused, data, monkeypatch):
    monkeypatch.setattr("varscale.data.memory.available_memory", lambda: 1000)
    message = refused(f"data.dir={data}", "data.os_cache=true")
    assert f"{data / 'train.beton'} has" in message
    assert "set data.os_cache=false" in message


def test_ffcv_missing(refused, data, monkeypatch):
    monkeypatch.setattr("varscale.data.libffcv.imdecode", lambda: None)
    assert "set data.loader=torch" in refused(f"data.dir={data}")


def test_output_directory_in_use(refused, data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "holds files that are not a run's" in refused(f"data.dir={data}", "output_dir=mine")
    manifest = tmp_path / "mine" / "manifest.json"
    (tmp_path / "mine" / "thesis.tex").rename(manifest)
    assert "already holds a run; continue it with --resume auto" in refused(f"data.dir={data}", "output_dir=mine")
    for content, message in (("", "not valid JSON"), ("[]", "not a manifest of a run"), ('{"a": 1}', "not a manifest")):
        manifest.write_text(content)
        told = refused(f"data.dir={data}", "output_dir=mine", "--resume", "auto")
        assert f"mine/manifest.json: {message}" in told
    for place in (manifest, manifest / "below"):
        assert f"{manifest} is a file" in refused(f"data.dir={data}", f"output_dir={place}")


@pytest.mark.parametrize("mode", [0o500, 0o555])
def test_output_directory_that_cannot_be_written(unprivileged, mode):
    with TemporaryDirectory() as folder:
        Path(folder).chmod(mode)
        config = load_config("digits-varcon", [f"output_dir={folder}/runs/a"])
        with unprivileged(), pytest.raises(UserError, match=rf"cannot be written \(no permission in {folder}\)"):
            check_run_directory(config, "digest", None)


def test_a_run_that_ended_before_its_first_checkpoint_may_be_deleted(data, tmp_path):
    given = [f"data.dir={data}", f"output_dir={tmp_path / 'mine'}"]
    config, digest = load_config("digits-varcon", given), read_dataset_info(data).digest
    write_manifest(config, {}, digest, world_size=1, device="cpu")
    assert check_run_directory(config, digest, "auto").checkpoints == []
    other = load_config("digits-varcon", [*given, "optimizer.lr=9"])
    refusal = r"optimizer\.lr is 0\.05 there, 9\.0 now"
    with pytest.raises(UserError, match=f"{refusal}; it has no checkpoint: if it is not running, delete it$"):
        check_run_directory(other, digest, "auto")
    write_checkpoint(config.output_dir, 5, {}, {}, keep=1)
    with pytest.raises(UserError, match=f"{refusal}$"):
        check_run_directory(other, digest, "auto")


def test_a_world_of_no_ranks(capsys):
    with pytest.raises(SystemExit):
        train.main(["--config", "digits-varcon", "--dry-run", "--world-size", "0"])
    assert "is at least 1" in capsys.readouterr().err


def test_resuming_what_does_not_exist(refused, data, tmp_path):
    assert "there is no such run" in refused(f"data.dir={data}", "--resume", str(tmp_path / "gone"))


def test_resuming_one_run_into_another(refused, data, tmp_path):
    for name in ("mine", "yours"):
        config = load_config("digits-varcon", [f"data.dir={data}", f"output_dir={name}"])
        write_manifest(config, {}, read_dataset_info(data).digest, world_size=1, device="cpu")
        write_checkpoint(Path(name), 5, {}, {}, keep=1)
    for place in ("mine", "mine/checkpoints/step-00000005"):
        message = refused(f"data.dir={data}", "output_dir=yours", "--resume", place)
        assert "output_dir: yours already holds something" in message
        assert "or with output_dir=" in message


def test_a_tracker_that_is_not_installed(refused, data, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "wandb is not installed" in refused(f"data.dir={data}", "logging.trackers=[wandb]")


def test_argparse_itself_answers_with_two(capsys):
    for arguments in ([], ["--config", "digits-varcon", "--world-size", "2"], ["--config", "digits-varcon", "--nope"]):
        with pytest.raises(SystemExit) as caught:
            train.main(arguments)
        assert caught.value.code == 2


def test_help_names_the_recipes(capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0
    assert "cifar100-varcon" in capsys.readouterr().out


def test_mistakes_are_answered_before_torch_is_loaded(launch, tmp_path):
    done = launch(
        "-c",
        "import sys; from varscale import train\n"
        f"code = train.main(['--config', 'digits-varcon', 'data.dir={tmp_path}'])\n"
        "print(code, {'torch', 'deepspeed', 'ffcv', 'numba'} & set(sys.modules))",
    )
    assert done.stdout.strip() == "2 set()"
