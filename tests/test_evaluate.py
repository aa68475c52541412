"""The evaluation program from end to end on a tiny run, and everything it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from betons import damage
from PIL import Image

from varscale.config import load_config
from varscale.data.conversion import convert
from varscale.data.dataset import read_dataset_info
from varscale.data.sources import open_source
from varscale.encoder.runs import new_encoder, trained_encoder
from varscale.engine.checkpoints import read_part, write_checkpoint
from varscale.engine.manifest import write_manifest
from varscale.evaluate import main, open_images
from varscale.evaluation.context import Context, Place

TRAIN, VAL, CLASSES = 60, 30, 4


def convert_colours(folder: Path, *, size: int = 8, classes: int = CLASSES) -> str:
    """A data set in which each class is a colour under noise; returns its digest."""
    random = np.random.default_rng(0)
    colours = random.integers(40, 216, (classes, 1, 1, 3))
    arrays = {}
    for split, count in (("train", TRAIN), ("test", VAL)):
        labels = np.arange(count) % classes
        noise = random.integers(-40, 40, (count, size, size, 3))
        arrays |= {f"x_{split}": (colours[labels] + noise).astype(np.uint8), f"y_{split}": labels}
    folder.parent.mkdir(parents=True, exist_ok=True)
    np.savez(folder.with_suffix(".npz"), **arrays)
    return convert(open_source(f"npz:{folder.with_suffix('.npz')}"), folder).info.digest


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("data") / "colours"
    return folder, convert_colours(folder)


@pytest.fixture
def run(tmp_path: Path, data: tuple[Path, str]) -> Path:
    """A run whose "trained" encoder has the parameters of another seed than the untrained one of the baselines."""
    return make_run(tmp_path / "run", *data, size=8)


def make_run(place: Path, folder: Path, digest: str, size: int) -> Path:
    overrides = [f"output_dir={place}", f"data.dir={folder}", f"data.image_size={size}"]
    config = load_config("digits-varcon", overrides)
    write_manifest(config, {}, digest, world_size=1, device="cpu")
    encoder = new_encoder(config.model_copy(update={"seed": config.seed + 1}))
    tensors = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    write_checkpoint(place, 42, {"model": tensors}, {}, keep=1)
    return place


@pytest.fixture(autouse=True)
def new_process() -> None:
    """Accelerate keeps one state a process, and refuses another precision in it."""
    AcceleratorState._reset_state(reset_partial_state=True)


def results(run: Path) -> dict[tuple[str, str], dict]:
    content = json.loads((run / "evaluation" / "step-00000042.json").read_text())
    assert content["step"] == 42
    return {(one["model"], one["evaluator"]): one for one in content["results"]}


def test_all_evaluators_and_baselines_in_one_table(run, data, capsys):
    arguments = ["--checkpoint", str(run), "knn", "linear", "linear_cached", "--baselines"]
    assert main([*arguments, "linear.epochs=3", "--batch-size", "16", "knn.k=[5,100]"]) == 0
    printed = capsys.readouterr().out
    found = results(run)
    models, evaluators = ("trained", "untrained", "pixels"), ("knn", "linear", "linear_cached")
    assert set(found) == {(model, evaluator) for model in models for evaluator in evaluators}
    for record in found.values():
        assert all(0 <= value <= 100 for value in record["metrics"].values())
        assert (record["data"]["train"], record["data"]["val"], record["data"]["digest"]) == (TRAIN, VAL, data[1])
    # Noisy colours: easy for pixels, so that far below this the labels and images would not belong together.
    assert found["pixels", "knn"]["metrics"]["top1_k5"] > 90
    assert found["pixels", "linear_cached"]["metrics"]["top1"] > 90
    assert found["trained", "knn"]["settings"]["k_used"] == [5, 60]
    assert "k = 100: only 60 training samples" in printed
    row = next(line for line in printed.splitlines() if line.startswith("knn") and "top1_k5" in line).split()
    assert [float(number) for number in row[3:]] == [
        round(found[model, "knn"]["metrics"]["top1_k5"], 2) for model in models
    ]


def test_both_linear_protocols_stand_beside_each_other(run, data, capsys):
    for protocol in ("cifar", "imagenet"):
        new = [f"linear.protocol={protocol}", "linear.epochs=2", "--batch-size", "16"]
        assert main(["--checkpoint", str(run), "linear", *new]) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "top1" in line]
    assert rows == [["linear", "top1"], ["linear", "(imagenet)"]]
    records = json.loads((run / "evaluation" / "step-00000042.json").read_text())["results"]
    assert [record["variant"] for record in records] == ["", "imagenet"]
    assert records[1]["settings"] == {"protocol": "imagenet", "epochs": 2, "lr": 1.2, "batch_size": TRAIN}


def test_the_columns_of_experiments_are_metrics_that_there_are(repository, tmp_path):
    lists = yaml.safe_load((repository / "tools" / "experiments.yaml").read_text())
    tables = [lists["columns"], *(one["columns"] for one in lists["experiments"].values() if "columns" in one)]
    columns = {tuple(column) for table in tables for column in table.values()}
    folder = tmp_path / "colours"
    run = make_run(tmp_path / "run", folder, convert_colours(folder, size=32), size=32)
    arguments = ["--checkpoint", str(run), *sorted({name for name, _ in columns})]
    quickly = [
        f"transfer.data={folder}",
        "transfer.epochs=1",
        "corruption.names=[brightness]",
        "few_shot.seeds=2",
        "few_shot.shots=[]",
        "--batch-size",
        "16",
    ]
    assert main([*arguments, *quickly]) == 0
    found = {name: record["metrics"] for (_, name), record in results(run).items()}
    assert [column for column in columns if column[1] not in found[column[0]]] == []


def test_later_results_join_earlier_ones(run, data):
    checkpoint = run / "checkpoints" / "step-00000042"
    assert main(["--checkpoint", str(run), "--data", str(data[0]), "knn"]) == 0
    before = results(run)["trained", "knn"]
    assert main(["--checkpoint", str(checkpoint), "linear_cached"]) == 0
    found = results(run)
    assert found["trained", "knn"] == before
    assert found["trained", "linear_cached"]["metrics"]["top1"] > 50
    assert main(["--checkpoint", str(run), "knn", "knn.k=[3]"]) == 0
    assert list(results(run)["trained", "knn"]["metrics"]) == ["top1_k3", "top5_k3"]
    assert len(results(run)) == 2


def test_half_precision_reaches_the_encoder(run, monkeypatch):
    seen = set()
    forward = torch.nn.functional.conv2d

    def watched(*arguments, **options):
        seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return forward(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    assert main(["--checkpoint", str(run), "knn", "--precision", "bfloat16"]) == 0
    assert seen == {torch.bfloat16}
    assert results(run)["trained", "knn"]["precision"] == "bfloat16"


def test_it_runs_as_a_file_without_deepspeed_and_hides_no_package(run, repository, tmp_path):
    """In a process in which importing deepspeed fails, started as `python varscale/evaluate.py`."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['deepspeed'] = None\n")
    (tmp_path / "elsewhere").mkdir()
    script = repository / "varscale" / "evaluate.py"
    check = (
        f"import sys, runpy\nsys.argv = {[str(script), '--checkpoint', str(run), 'knn']!r}\n"
        f"sys.path[0] = {str(script.parent)!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    import importlib.util as u\n"
        "    found = map(u.find_spec, ('evaluate', 'data', 'models', 'config', 'export'))\n"
        "    print('hidden:', [s for s in found if s and s.origin])\n"  # a mere folder has no origin and hides nothing
    )
    done = subprocess.run(
        [sys.executable, "-c", check],
        cwd=tmp_path / "elsewhere",
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "top1_k20" in done.stdout
    assert "hidden: []" in done.stdout
    assert ("trained", "knn") in results(run)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that `arguments` are answered with."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["knm"], "unknown evaluator 'knm'; choose from knn, linear, linear_cached"),
        (["knm"], "nearest: knn"),
        (["linear-cached"], "nearest: linear_cached"),
        (["knn", "knn.k=[0]"], "evaluators: knn.k.0 is 0: input should be greater than 0"),
        (["knn", "knn.k=[]"], "evaluators: knn.k is []"),
        (["knn", "knn.k=many"], "evaluators: knn.k is 'many'"),
        (["knn", "knn.temperature=0"], "evaluators: knn.temperature is 0"),
        (["knn", "knn.temperature=.nan"], "evaluators: knn.temperature is nan"),
        (["knn", "knn.temprature=1"], "evaluators: unknown key 'knn.temprature'; nearest: knn.temperature"),
        (["knn", "epochs=1"], "evaluators: unknown key 'epochs'; nearest: linear.epochs"),
        (["linear", "linear=3"], "linear is a section, not a value; set one of linear.epochs"),
        (["linear", "linear.protocol=[1]"], "linear.protocol is [1]; choose from cifar, imagenet"),
        (["embedding_plot", "embedding_plot.samples=11"], "greater than or equal to 12"),
        (["knn", "knn=3"], "evaluators: knn is a section, not a value; set one of knn.k, knn.layer, knn.temperature"),
        (["knn", "linear.lr=1"], "override 'linear.lr=1': linear is not among the evaluators asked for"),
        (["few_shot", "few_shot.percent=[0]"], "evaluators: few_shot.percent.0 is 0"),
        (
            ["few_shot", "few_shot.percent=[]", "few_shot.shots=[]"],
            "few_shot.percent and few_shot.shots are both empty",
        ),
        (["corruption", "corruption.names=[]"], "evaluators: corruption.names is []"),
        (["clustering", "clustering.layer=head"], "clustering.layer is 'head'; choose from features, embeddings"),
        (["clustering", "clustering.sample=9"], "unknown key 'clustering.sample'; nearest: clustering.samples"),
        (["calibration", "calibration.bins=1"], "evaluators: calibration.bins is 1"),
        (["embedding_plot", "embedding_plot.methods=[tsme]"], "nearest: tsne"),
        (["transfer"], "transfer.data is not set"),
        (["transfer", "transfer.data=nowhere"], "nowhere holds no converted data set"),
        (["corruption", "corruption.dir=nowhere"], "corruption.dir nowhere: there is no such folder"),
        (["corruption", "corruption.names=[frog]"], "'frog' is none of"),
        (["linear", "linear.epochs=0"], "evaluators: linear.epochs is 0"),
        (["linear", "linear.lr=-1"], "evaluators: linear.lr is -1"),
        (["knn", "--batch-size", "0"], "--batch-size is 0"),
        (["knn", "--data", "nowhere"], "nowhere holds no converted data set"),
    ],
)
def test_bad_arguments(run, capsys, extra, expected):
    assert expected in refusal(["--checkpoint", str(run), *extra], capsys)
    assert not (run / "evaluation").exists()


def test_a_missing_run(run, capsys):
    message = refusal(["--checkpoint", str(run.with_name("rum")), "knn"], capsys)
    assert "no such run" in message
    assert str(run) in message


def test_data_of_another_number_of_classes(run, tmp_path, capsys):
    convert_colours(tmp_path / "five", classes=5)
    message = refusal(["--checkpoint", str(run), "--data", str(tmp_path / "five"), "knn"], capsys)
    assert "5 classes, but the run was trained on 4" in message


def test_data_of_smaller_images(run, tmp_path, capsys):
    convert_colours(tmp_path / "small", size=6)
    message = refusal(["--checkpoint", str(run), "--data", str(tmp_path / "small"), "knn"], capsys)
    assert "at most 6 pixels a side, but the run was trained on images of 8" in message


def test_data_without_labels(run, tmp_path, data, capsys):
    from ffcv.fields import RGBImageField
    from ffcv.writer import DatasetWriter

    class Images:
        def __len__(self) -> int:
            return TRAIN

        def __getitem__(self, index: int) -> tuple[np.ndarray]:
            return (np.full((8, 8, 3), index, dtype=np.uint8),)

    folder = tmp_path / "unlabelled"
    folder.mkdir()
    for name in ("dataset.json", "val.beton"):
        (folder / name).write_bytes((data[0] / name).read_bytes())
    writer = DatasetWriter(str(folder / "train.beton"), {"image": RGBImageField(write_mode="raw")}, num_workers=1)
    writer.from_indexed_dataset(Images())
    message = refusal(["--checkpoint", str(run), "--data", str(folder), "knn"], capsys)
    assert "train.beton: has no labels" in message


def test_a_truncated_beton(run, tmp_path, data, capsys):
    folder = tmp_path / "cut"
    folder.mkdir()
    for name in ("dataset.json", "val.beton", "train.beton"):
        (folder / name).write_bytes((data[0] / name).read_bytes())
    (folder / "val.beton").write_bytes((data[0] / "val.beton").read_bytes()[:-100])
    assert "val.beton" in refusal(["--checkpoint", str(run), "--data", str(folder), "knn"], capsys)


def test_a_damaged_sample(run, tmp_path, capsys):
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(CLASSES):
            path = tmp_path / "images" / split / f"class {label}" / "picture.jpg"
            path.parent.mkdir(parents=True)
            Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    convert(open_source(f"imagefolder:{tmp_path / 'images'}"), tmp_path / "other")
    damage(tmp_path / "other" / "val.beton", 2)
    capsys.readouterr()
    assert main(["--checkpoint", str(run), "knn", "--data", str(tmp_path / "other")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]  # behind the progress bar
    title = f"{tmp_path / 'other' / 'val.beton'}: sample 2 (val/class 2/picture.jpg)"
    assert message.startswith(f"error: {title} cannot be loaded: its JPEG header is damaged")


def test_a_checkpoint_of_another_architecture(run, capsys):
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["encoder"]["name"] = "resnet34"
    (run / "manifest.json").write_text(json.dumps(manifest))
    message = refusal(["--checkpoint", str(run), "knn"], capsys)
    assert "does not hold the resnet34" in message
    assert "layer1.2.bn1.bias" in message


def test_a_damaged_file_of_results(run, capsys):
    (run / "evaluation").mkdir()
    (run / "evaluation" / "step-00000042.json").write_text("{")
    assert main(["--checkpoint", str(run), "knn"]) == 2
    assert "step-00000042.json: not a file of results" in capsys.readouterr().err


def test_pictures_and_details_lie_beside_the_results(run, data, tmp_path):
    names = ["few_shot", "clustering", "calibration", "dispersion", "embedding_plot", "alignment_uniformity"]
    arguments = ["--checkpoint", str(run), *names, "few_shot.seeds=2", "embedding_plot.methods=[pca]"]
    assert main(arguments) == 0
    assert main(["--checkpoint", str(run), "dispersion", "calibration", "--baselines"]) == 0
    found = results(run)
    assert {model for model, name in found if name == "calibration"} == {"trained", "untrained", "pixels"}
    for (model, name), record in found.items():
        assert record["metrics"].keys() == record["units"].keys()
        assert set(record["units"].values()) <= {"%", ""}
        suffix = "" if model == "trained" else f"-{model}"
        expected = None if name == "alignment_uniformity" else f"step-00000042/{name}{suffix}.png"
        assert record["picture"] == expected
        assert expected is None or (run / "evaluation" / expected).read_bytes()[:4] == b"\x89PNG"
    assert found["trained", "calibration"]["units"] == {
        "top1": "%",
        "nll": "",
        "ece": "",
        "nll_adaptive": "",
        "ece_adaptive": "",
    }
    assert len(found["trained", "clustering"]["details"]["linkage"]) == CLASSES - 1
    assert found["trained", "calibration"]["notes"][0].startswith("there is no projection head")


def test_the_classifier_of_a_run_is_measured_by_itself(run, data, capsys):
    """One whose weights tell the colours of the classes apart by the features' own means."""
    checkpoint = run / "checkpoints" / "step-00000042"
    network = read_part(checkpoint, "model")
    encoder, config, _ = trained_encoder(run)
    info = read_dataset_info(data[0])
    images = open_images(data[0], info, info, config, 1)
    train = Context(encoder, images, Place(torch.device("cpu"), batch_size=16)).train
    means = torch.stack([train.features[train.labels == c].mean(dim=0) for c in range(CLASSES)])
    head = {
        "head.weight": 2 * means,
        "head.bias": -means.square().sum(dim=1),
    }  # the nearest mean has the greatest logit
    write_checkpoint(run, 42, {"model": network | head}, {}, keep=1)
    assert main(["--checkpoint", str(run), "classifier", "--baselines"]) == 0
    found = results(run)
    val = Context(encoder, images, Place(torch.device("cpu"), batch_size=16)).val
    nearest = torch.cdist(val.features.double(), means.double()).argmin(dim=1)
    expected = 100 * int((nearest == val.labels).sum()) / VAL
    assert found["trained", "classifier"]["metrics"]["top1"] == pytest.approx(expected)
    assert expected > 50
    assert found["untrained", "classifier"]["metrics"] == {"top1": None, "top5": None}
    assert "there is no classifier beside this encoder" in capsys.readouterr().out


def test_transfer_to_data_of_other_classes_and_sizes(run, tmp_path):
    convert_colours(tmp_path / "five", classes=5, size=6)
    arguments = ["--checkpoint", str(run), "transfer", f"transfer.data={tmp_path / 'five'}", "transfer.epochs=1"]
    assert main(arguments) == 0
    record = results(run)["trained", "transfer"]
    assert record["details"] == {"classes": 5, "train": TRAIN, "val": VAL}
    assert 20 <= record["metrics"]["finetune_top1"] <= 100
    assert record["metrics"]["linear_top1"] > 40
    assert "enlarged" in record["notes"][0]


def test_transfer_to_one_data_set_leaves_that_to_another_and_names_both(run, data, tmp_path, capsys):
    digests = {name: convert_colours(tmp_path / name, classes=count) for name, count in (("five", 5), ("three", 3))}
    arguments = ["--checkpoint", str(run), "transfer", "transfer.epochs=0"]
    for name in ("five", "three", "five"):
        assert main([*arguments, f"transfer.data={tmp_path / name}"]) == 0
        assert f"transfer on {name}  linear_top1  %" in capsys.readouterr().out
    content = json.loads((run / "evaluation" / "step-00000042.json").read_text())["results"]
    three, five = (record["data"] for record in content)
    assert (three["digest"], three["classes"], three["dir"]) == (digests["three"], 3, str(tmp_path / "three"))
    assert (five["digest"], five["classes"], five["dir"]) == (digests["five"], 5, str(tmp_path / "five"))


def test_corruptions_want_images_of_32_pixels(run, capsys):
    assert "have 8 pixels a side" in refusal(["--checkpoint", str(run), "corruption"], capsys)


def damaged_cache(run: Path) -> Path:
    path = sorted((run / "evaluation" / "features").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-9])
    return path


def test_a_second_evaluator_encodes_nothing(run, monkeypatch, capsys):
    assert main(["--checkpoint", str(run), "knn", "--baselines"]) == 0
    before = results(run)
    assert len(list((run / "evaluation" / "features").iterdir())) == 6
    with monkeypatch.context() as patch:
        patch.setattr("varscale.evaluation.context.extract_features", None)
        assert main(["--checkpoint", str(run), "knn", "linear_cached", "--baselines"]) == 0
    for key, record in before.items():
        assert results(run)[key]["metrics"] == record["metrics"]
    capsys.readouterr()
    path = damaged_cache(run)
    assert main(["--checkpoint", str(run), "knn", "--baselines"]) == 0
    assert f"note: {path} is damaged" in capsys.readouterr().err
    assert {key: record["metrics"] for key, record in results(run).items() if key[1] == "knn"} == {
        key: record["metrics"] for key, record in before.items()
    }


def test_without_the_cache_nothing_is_read_or_kept(run, monkeypatch):
    assert main(["--checkpoint", str(run), "knn", "--no-cache"]) == 0
    assert not (run / "evaluation" / "features").exists()


def test_precision_and_encoder_have_caches_of_their_own(run):
    assert main(["--checkpoint", str(run), "knn"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["--checkpoint", str(run), "knn", "--precision", "bfloat16"]) == 0
    assert len(list((run / "evaluation" / "features").iterdir())) == 4


def test_help_imports_neither_scikit_learn_nor_matplotlib(repository):
    check = (
        "import sys\nfrom varscale.evaluate import parse\n"
        "try:\n    parse(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('loaded:', sorted({'sklearn', 'matplotlib', 'imagecorruptions', 'umap'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=repository, capture_output=True, text=True, timeout=100)
    assert "loaded: []" in done.stdout, done.stdout + done.stderr
    assert "knn.k=[20,200]" in done.stdout
