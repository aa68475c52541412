"""Corruptions: those made on the fly, CIFAR-C's files and ImageNet-C's folders, and the mean corruption error."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from varscale.data.conversion import convert
from varscale.data.dataset import read_dataset_info
from varscale.data.geometry import CropSpec
from varscale.data.sources import open_source
from varscale.errors import UserError
from varscale.evaluation import corruption
from varscale.evaluation.context import Context, Place
from varscale.evaluation.corrupted import (
    COMMON,
    OnTheFly,
    check_library,
    corrupt,
    evaluation_crop,
    open_folder,
)
from varscale.evaluation.corruption import Settings, check, run
from varscale.evaluation.images import Images

SIDE, CLASSES = 32, 3


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Images:
    """45 training and 30 validation images, each class a colour under noise."""
    folder = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
    arrays = {}
    for split, count in (("train", 45), ("test", 30)):
        labels = np.arange(count) % CLASSES
        noise = random.integers(-50, 50, (count, SIDE, SIDE, 3))
        arrays |= {f"x_{split}": (colours[labels][:, None, None] + noise).astype(np.uint8), f"y_{split}": labels}
    np.savez(folder / "a.npz", **arrays)
    convert(open_source(f"npz:{folder / 'a.npz'}"), folder / "data")
    return make_images(folder / "data", SIDE)


def make_images(folder: Path, size: int) -> Images:
    info = read_dataset_info(folder)
    crop = CropSpec(size, (0.2, 1.0))
    return Images(folder, info, random_crop=crop, mean=info.mean, std=info.std, seed=3, workers=1)


def context_of(images: Images) -> Context:
    def encode(batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(batch, 2).flatten(1)

    return Context(encode, images, Place(torch.device("cpu"), batch_size=8))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr("varscale.evaluation.linear_cached.MIN_STEPS", 30)


def test_corrupted_images_are_a_function_of_seed_sample_corruption_and_severity(images):
    clean = OnTheFly(images, 30, COMMON).clean(np.arange(4))
    samples = np.arange(4)
    for name in COMMON:
        state = np.random.get_state()[1].tolist()  # noqa: NPY002
        together = corrupt(clean, samples, name, 3, seed=1)
        assert together.dtype == np.uint8
        assert not np.array_equal(together, clean)
        np.testing.assert_array_equal(corrupt(clean[2:], samples[2:], name, 3, seed=1), together[2:])
        assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    noisy = corrupt(clean, samples, "gaussian_noise", 3, seed=1)
    assert not np.array_equal(corrupt(clean, samples, "gaussian_noise", 3, seed=2), noisy)
    assert not np.array_equal(corrupt(clean, samples + 1, "gaussian_noise", 3, seed=1), noisy)


def test_severities_are_the_packages(images):
    import imagecorruptions

    source = OnTheFly(images, 30, COMMON)
    clean = source.clean(np.arange(1))
    for severity in (1, 5):  # no chance is involved in contrast
        expected = imagecorruptions.corrupt(clean[0], severity, "contrast")
        np.testing.assert_array_equal(corrupt(clean, np.arange(1), "contrast", severity, 0)[0], expected)
        np.testing.assert_array_equal(source.images("contrast", severity, np.arange(1))[0], expected)


def test_on_the_fly_accuracy_by_corruption_and_severity(images):
    settings = Settings(names=("contrast", "gaussian_noise"), samples=24)
    result = run(context_of(images), settings)
    table = result.details["accuracy"]["linear"]
    assert list(table) == ["contrast", "gaussian_noise"]
    assert all(len(values) == 5 for values in table.values())
    assert result.metrics["clean_linear"] == 100
    assert table["contrast"] == [100.0] * 5, "it leaves an image's mean colour as it is"
    assert result.metrics["corrupted_linear"] == pytest.approx(np.mean(list(table.values())))
    assert set(result.metrics) == {f"{kind}_{name}" for kind in ("clean", "corrupted") for name in ("linear", "knn")}
    assert result.notes == (), "without a reference there is no mean corruption error to be told of"
    assert result.settings["samples_used"] == 24
    assert result.variant == "made on the fly"
    figure = corruption.draw(result.details)
    assert [axis.get_title() for axis in figure.axes] == ["linear classifier", "knn classifier"]


BRIGHTNESS, NOISE = [90.0, 80.0, 70.0, 60.0, 50.0], [100.0, 100.0, 100.0, 100.0, 0.0]


def write_cifar_c(folder: Path, images: Images) -> np.ndarray:
    """Two corruptions that put images of the next class in the place of others, so that the accuracies of a classifier
    without errors are BRIGHTNESS and NOISE. Returns the labels."""
    source = OnTheFly(images, 30, COMMON)
    clean, labels = source.clean(np.arange(30)), source.labels("", 1).numpy()
    of_class = [clean[np.flatnonzero(labels == c)[0]] for c in range(CLASSES)]
    wrong = np.stack([of_class[(label + 1) % CLASSES] for label in labels])
    folder.mkdir()
    for name, counts in (("brightness", (3, 6, 9, 12, 15)), ("gaussian_noise", (0, 0, 0, 0, 30))):
        np.save(folder / f"{name}.npy", np.concatenate([[*wrong[:count], *clean[count:]] for count in counts]))
    np.save(folder / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    return np.tile(labels, 5)


def test_cifar_c_is_read_block_by_block(images, tmp_path):
    labels = write_cifar_c(tmp_path / "c", images)
    source = open_folder(tmp_path / "c", images, 100)
    assert source.names == ("gaussian_noise", "brightness")
    rows = np.array([3, 17])
    stored = np.load(tmp_path / "c" / "brightness.npy")
    np.testing.assert_array_equal(source.images("brightness", 2, rows), stored[30 + rows])
    assert source.labels("brightness", 2).tolist() == labels[:30].tolist()
    result = run(context_of(images), Settings(dir=tmp_path / "c"))
    expected = {"gaussian_noise": NOISE, "brightness": BRIGHTNESS}
    assert result.details["accuracy"] == {"linear": expected, "knn": expected}
    assert result.metrics == {"clean_linear": 100, "corrupted_linear": 75, "clean_knn": 100, "corrupted_knn": 75}
    assert result.variant == "c"


def test_of_a_folder_all_images_are_taken_unless_fewer_are_asked_for(images, tmp_path):
    (tmp_path / "c").mkdir()
    count = corruption.ON_THE_FLY + 2
    np.save(tmp_path / "c" / "fog.npy", np.zeros((5 * count, SIDE, SIDE, 3), np.uint8))
    np.save(tmp_path / "c" / "labels.npy", np.arange(5 * count) % CLASSES)
    assert run(context_of(images), Settings(dir=tmp_path / "c")).settings["samples_used"] == count
    assert run(context_of(images), Settings(dir=tmp_path / "c", samples=9)).settings["samples_used"] == 9


def test_imagenet_c_is_read_from_folders(images, tmp_path):
    random = np.random.default_rng(1)
    for severity in range(1, 6):
        for number, name in enumerate(images.classes):
            place = tmp_path / "c" / "blur" / "defocus_blur" / str(severity) / name
            place.mkdir(parents=True)
            pixels = np.full((40, 50, 3), 60, np.uint8)
            pixels[..., number] = 200
            pixels += random.integers(0, 9, pixels.shape, dtype=np.uint8)
            Image.fromarray(pixels).save(place / "a.png")
    source = open_folder(tmp_path / "c", images, 100)
    assert source.names == ("defocus_blur",)
    assert source.labels("defocus_blur", 4).tolist() == [0, 1, 2]
    assert source.images("defocus_blur", 4, np.arange(3)).shape == (3, SIDE, SIDE, 3)
    assert run(context_of(images), Settings(dir=tmp_path / "c")).metrics["corrupted_knn"] == 100
    (tmp_path / "c" / "blur" / "defocus_blur" / "2" / "n01").mkdir()
    with pytest.raises(UserError, match="n01: is none of the data set's 3 classes"):
        open_folder(tmp_path / "c", images, 100)


def test_the_crop_is_that_of_the_loader():
    image = np.arange(48 * 40 * 3, dtype=np.uint8).reshape(48, 40, 3)
    np.testing.assert_array_equal(evaluation_crop(image[:40], 40), image[:40])
    from torchvision.transforms import v2

    resize = v2.Compose([v2.Resize(37, antialias=True), v2.CenterCrop(32)])
    expected = resize(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(evaluation_crop(image, 32), expected)


def test_the_mean_error_is_relative_to_alexnets(images, tmp_path):
    write_cifar_c(tmp_path / "c", images)
    result = run(context_of(images), Settings(dir=tmp_path / "c", reference="alexnet"))
    expected = (150 / 5 / 0.564592 + 100 / 5 / 0.886428) / 2  # its errors on ImageNet-C's brightness and gaussian_noise
    assert result.metrics["mce_linear"] == pytest.approx(expected, rel=1e-9)
    assert result.metrics["mce_knn"] == pytest.approx(expected, rel=1e-9)
    assert "AlexNet's published errors" in result.notes[0]
    assert result.notes[1] == "mce: the mean over 2 corruptions, not over the 15 common ones"
    assert result.settings["names"] == ["gaussian_noise", "brightness"]


def test_another_runs_result_is_a_reference(images, tmp_path):
    write_cifar_c(tmp_path / "c", images)
    accuracy = {"brightness": [88.0] * 5, "gaussian_noise": [60.0] * 5}  # errors: 60 and 200, ours 150 and 100
    record = {"evaluator": "corruption", "model": "untrained", "variant": "c"}
    record |= {"details": {"accuracy": {"linear": accuracy, "knn": accuracy | {"brightness": [70.0] * 5}}}}
    record |= {"data": {"digest": images.info.digest}, "settings": {"samples_used": 30}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": [record, record | {"variant": "other", "details": {}}]}))
    settings = Settings(dir=tmp_path / "c", reference=str(path), reference_model="untrained")
    result = run(context_of(images), settings)
    assert result.metrics["mce_linear"] == pytest.approx((250 + 50) / 2)
    assert result.metrics["mce_knn"] == pytest.approx((100 + 50) / 2)
    assert "relative to the errors of untrained" in result.notes[0]
    with pytest.raises(UserError, match=r"holds no result of corruption \(c\) for trained"):
        check(settings.model_copy(update={"reference_model": "trained"}))
    with pytest.raises(UserError, match=r"holds no result of corruption \(made on the fly\) for untrained"):
        check(settings.model_copy(update={"dir": None}))
    others = record | {"settings": {"samples_used": 29}}, record | {"data": {"digest": "another"}}
    for number, other in enumerate(others):
        (tmp_path / f"{number}.json").write_text(json.dumps({"results": [other]}))
        with pytest.raises(UserError, match="was measured on other images"):
            run(context_of(images), settings.model_copy(update={"reference": str(tmp_path / f"{number}.json")}))
    (tmp_path / "c" / "brightness.npy").rename(tmp_path / "c" / "fog.npy")
    with pytest.raises(UserError, match="has no errors for fog"):
        run(context_of(images), settings)


def test_what_is_refused_beforehand(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no such folder"):
        check(Settings(dir=tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"'fogg' is none of .*; nearest: fog"):
        check(Settings(names=("fogg",)))
    with pytest.raises(UserError, match="cannot be read"):
        check(Settings(reference=str(tmp_path / "missing.json")))
    with pytest.raises(UserError, match="belongs to ImageNet-C"):
        check(Settings(reference="alexnet"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install imagecorruptions-imaug"):
        check_library(COMMON)


def test_folders_that_are_neither(images, tmp_path):
    with pytest.raises(UserError, match="holds neither"):
        open_folder(tmp_path, images, 10)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((149, SIDE, SIDE, 3), np.uint8), r"as many as there are labels \(150\)"),
        (np.zeros((150, SIDE, SIDE, 3), np.float32), "found float32"),
        (np.zeros((150, SIDE, SIDE), np.uint8), "found uint8 of shape"),
    ],
)
def test_arrays_that_are_not_cifar_cs(images, tmp_path, array, message):
    write_cifar_c(tmp_path / "c", images)
    np.save(tmp_path / "c" / "fog.npy", array)
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path / "c", images, 10)


def test_labels_of_other_classes(images, tmp_path):
    write_cifar_c(tmp_path / "c", images)
    np.save(tmp_path / "c" / "labels.npy", np.full(150, 7))
    with pytest.raises(UserError, match="expected classes from 0 to 2"):
        open_folder(tmp_path / "c", images, 10)


def test_a_truncated_file(images, tmp_path):
    write_cifar_c(tmp_path / "c", images)
    path = tmp_path / "c" / "brightness.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"brightness.npy: cannot be read"):
        open_folder(tmp_path / "c", images, 10)


def test_images_too_small_for_the_package():
    with pytest.raises(UserError, match="have 16 pixels a side"):
        OnTheFly(SimpleNamespace(random_crop=CropSpec(16, None)), 10, COMMON)
