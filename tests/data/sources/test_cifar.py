"""CIFAR by torchvision's own classes, on archives of its layout (its checksums replaced by those of our files)."""

import os
import pickle

import numpy as np
import pytest
import torchvision

from varscale.data.sources import open_source
from varscale.errors import UserError


def make_cifar(root, monkeypatch, dataset, label_key, batches, meta_key, names):
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    made = {}
    for name in batches:
        pixels = rng.integers(0, 256, (20, 3072), np.uint8)
        labels = (np.arange(20) * 3 + len(made)) % len(names)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, label_key: labels.tolist()}))
        made[name] = pixels.reshape(20, 3, 32, 32).transpose(0, 2, 3, 1), labels
    meta = dataset.meta["filename"]
    (folder / meta).write_bytes(pickle.dumps({meta_key: names}))
    monkeypatch.setattr(dataset, "train_list", [[name, None] for name in batches[:-1]])
    monkeypatch.setattr(dataset, "test_list", [[batches[-1], None]])
    monkeypatch.setitem(dataset.meta, "md5", None)
    return made


def test_cifar10(tmp_path, monkeypatch):
    names = [f"class {index}" for index in range(10)]
    made = make_cifar(
        tmp_path,
        monkeypatch,
        torchvision.datasets.CIFAR10,
        "labels",
        ["data_batch_1", "data_batch_2", "test_batch"],
        "label_names",
        names,
    )
    source = open_source("cifar10", download_dir=tmp_path)
    assert source.classes == tuple(names)
    pixels, labels = (np.concatenate(pair) for pair in zip(made["data_batch_1"], made["data_batch_2"], strict=True))
    np.testing.assert_array_equal(source.train.labels, labels)
    np.testing.assert_array_equal([source.train.content(index) for index in range(40)], pixels)
    np.testing.assert_array_equal(source.val.labels, made["test_batch"][1])


def test_cifar100_takes_the_fine_labels(tmp_path, monkeypatch):
    names = [f"fine {index}" for index in range(20)]
    made = make_cifar(
        tmp_path,
        monkeypatch,
        torchvision.datasets.CIFAR100,
        "fine_labels",
        ["train", "test"],
        "fine_label_names",
        names,
    )
    source = open_source("cifar100", download_dir=tmp_path)
    assert source.classes == tuple(names)
    np.testing.assert_array_equal(source.val.labels, made["test"][1])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_without_network_says_what_to_do(tmp_path, monkeypatch, name):
    dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    monkeypatch.setattr(dataset, "url", "http://127.0.0.1:9/cifar.tar.gz")  # nobody listens there
    with pytest.raises(UserError, match=rf"{name}: no complete copy in .*failed .*refused.*--download-dir FOLDER"):
        open_source(name, download_dir=tmp_path / "new")
    assert os.listdir(tmp_path) == []
