"""Transfer to another data set: linear and fine-tuned, and that the encoder measured afterwards is the same."""

import numpy as np
import pytest
import torch
from torch import nn

from varscale.data.conversion import convert
from varscale.data.dataset import read_dataset_info
from varscale.data.geometry import CropSpec
from varscale.data.sources import open_source
from varscale.errors import UserError
from varscale.evaluation.context import Context, Place
from varscale.evaluation.images import Images
from varscale.evaluation.transfer import Settings, check, finetune, run


class Encoder(nn.Sequential):
    feature_dim = 8

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Two classes that differ in where a smooth image is bright, not in colour: a mean does not tell them apart."""
    folder = tmp_path_factory.mktemp("other")
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 64), ("test", 40)):
        labels = np.arange(count) % 2
        stripes = np.where(np.arange(12) // 2 % 2, 60, 180)
        pictures = np.where(labels[:, None, None], stripes[None, :, None], stripes[None, None, :])
        noise = random.integers(-20, 20, (count, 12, 12, 3))
        arrays |= {f"x_{split}": (pictures[..., None] + noise).astype(np.uint8), f"y_{split}": labels}
    np.savez(folder / "a.npz", **arrays)
    convert(open_source(f"npz:{folder / 'a.npz'}"), folder / "data")
    return folder / "data"


@pytest.fixture
def context(digits, monkeypatch) -> Context:
    monkeypatch.setattr("varscale.evaluation.linear_cached.MIN_STEPS", 30)
    torch.manual_seed(0)
    encoder = Encoder().eval().requires_grad_(False)
    info = read_dataset_info(digits)
    crop = CropSpec(16, (0.5, 1.0))
    images = Images(digits, info, random_crop=crop, mean=info.mean, std=info.std, seed=0, workers=1)
    return Context(encoder, images, Place(torch.device("cpu"), batch_size=16), encoder=encoder)


def test_fine_tuning_learns_what_frozen_features_lack_and_leaves_the_encoder_alone(context, other):
    before = {name: tensor.clone() for name, tensor in context.encoder.state_dict().items()}
    result = run(context, Settings(data=other, epochs=8, lr=0.1, batch_size=16))
    assert result.metrics["finetune_top1"] >= 95
    assert result.metrics["finetune_top1"] >= result.metrics["linear_top1"]
    assert set(result.metrics) == {"linear_top1", "linear_top5", "finetune_top1", "finetune_top5"}
    assert "enlarged" in result.notes[0]
    assert result.details == {"classes": 2, "train": 64, "val": 40}
    for name, tensor in context.encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(parameter.requires_grad for parameter in context.encoder.parameters())
    assert not context.encoder.training


def test_it_is_reproducible(context, other):
    settings = Settings(data=other, epochs=2, lr=0.05, batch_size=20)
    assert run(context, settings).metrics == run(context, settings).metrics


def test_every_rank_fine_tunes_alone_to_the_same(context, other):
    settings = Settings(data=other, epochs=2, lr=0.05, batch_size=20)
    elsewhere = context.on(other, read_dataset_info(other))
    first = finetune(elsewhere, settings)

    def gather(rows):
        pytest.fail("the other rank was asked for its share")

    elsewhere.place = Place(torch.device("cpu"), rank=1, world_size=2, gather=gather, batch_size=16)
    assert finetune(elsewhere, settings) == first


def test_no_epochs_or_no_network_means_linear_alone(context, other):
    assert set(run(context, Settings(data=other, epochs=0)).metrics) == {"linear_top1", "linear_top5"}
    context.encoder = None
    result = run(context, Settings(data=other, epochs=3))
    assert set(result.metrics) == {"linear_top1", "linear_top5"}
    assert "no network to fine-tune" in result.notes[-1]


def test_data_must_be_named_and_there(tmp_path):
    with pytest.raises(
        UserError, match=r"transfer.data is not set: name another converted data set by transfer.data=DIR"
    ):
        check(Settings())
    with pytest.raises(UserError, match="holds no converted data set"):
        check(Settings(data=tmp_path))
