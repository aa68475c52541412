"""Feature extraction through the real loader: each sample once, in order, whatever the batches and ranks."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from varscale.data.augment import Augmentation
from varscale.data.beton import MODE_JPEG, BetonWriter
from varscale.data.conversion import convert
from varscale.data.decoders import installed_decoder
from varscale.data.geometry import CropSpec
from varscale.data.loader import ViewLoader
from varscale.data.sources import open_source
from varscale.evaluation.features import Features, encode_batches, extract_features

CPU = torch.device("cpu")
SAMPLES, SIZE = 29, 8


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SAMPLES, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def loader(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> ViewLoader:
    folder: Path = tmp_path_factory.mktemp("data")
    labels = np.arange(SAMPLES) % 3
    np.savez(folder / "a.npz", x_train=images, y_train=labels, x_test=images[:6], y_test=labels[:6])
    convert(open_source(f"npz:{folder / 'a.npz'}"), folder / "converted")
    return ViewLoader(folder / "converted" / "train.beton", [CropSpec(SIZE, None)], seed=0, workers=1)


@pytest.fixture(scope="module")
def normalise() -> Augmentation:
    return Augmentation("none", 1, SIZE, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), seed=0)


class Network:
    """A small frozen network that remembers how it was called."""

    def __init__(self):
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Flatten()]
        self.network = torch.nn.Sequential(*layers).eval()
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.shapes.append(tuple(images.shape))
        return self.network(images)


def extract(network, loader, normalise, batch_size: int, rank: int = 0, world_size: int = 1, **more) -> Features:
    options = {"rank": rank, "world_size": world_size, "batch_size": batch_size, "device": CPU} | more
    return extract_features(network, loader, normalise, **options)


@pytest.mark.parametrize("batch_size", [1, 7, 29, 100])
def test_every_sample_once_in_order(images, loader, normalise, batch_size):
    network = Network()
    found = extract(network, loader, normalise, batch_size)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    expected = network.network((pixels - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / 0.2)
    torch.testing.assert_close(found.features, expected.detach(), rtol=1e-5, atol=1e-5)
    assert found.features.dtype == torch.float32
    assert found.indices.tolist() == list(range(SAMPLES))
    assert found.labels.tolist() == [i % 3 for i in range(SAMPLES)]


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 8), (3, 4), (4, 10), (8, 8)])
def test_all_ranks_make_the_same_calls_and_together_find_the_same(loader, normalise, world_size, batch_size):
    """Ranks one after the other: the first ones leave their rows, the last one gathers them all."""
    left: dict[int, list[Tensor]] = {}
    networks = [Network() for _ in range(world_size)]
    for rank, network in enumerate(networks):
        calls = iter(range(10_000))

        def gather(rows: Tensor, rank: int = rank, calls=calls) -> Tensor:
            parts = left.setdefault(next(calls), [])
            parts.append(rows)
            # Ranks before the last see their own rows only, padding as their own: enough to go on.
            return torch.cat(parts) if rank == world_size - 1 else rows

        if rank < world_size - 1:
            order = np.arange(SAMPLES)
            options = {"rank": rank, "world_size": world_size, "batch_size": batch_size, "device": CPU}
            list(encode_batches(network, loader, normalise, order, gather=gather, **options))
        else:
            found = extract(network, loader, normalise, batch_size, rank, world_size, gather=gather)
    assert len({tuple(network.shapes) for network in networks}) == 1
    assert {shape[0] for shape in networks[0].shapes} == {batch_size}
    alone = extract(Network(), loader, normalise, batch_size)
    assert torch.equal(found.features, alone.features)
    assert torch.equal(found.labels, alone.labels)


def test_a_stream_keeps_the_order_asked_for(loader, normalise):
    order = np.array([5, 2, 28, 2, 11])
    options = {"rank": 0, "world_size": 1, "batch_size": 2, "device": CPU}
    parts = list(encode_batches(Network(), loader, normalise, order, **options))
    assert torch.cat([part.indices for part in parts]).tolist() == order.tolist()
    everything = extract(Network(), loader, normalise, 2)
    assert torch.equal(torch.cat([part.features for part in parts]), everything.features[order])


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of which samples 4 and 5 and the last one, 12, are nothing but zeros."""
    path = tmp_path_factory.mktemp("damaged") / "damaged.beton"
    random = np.random.default_rng(0)
    with BetonWriter(path, 13) as writer:
        for index in range(13):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(buffer, "JPEG")
            jpeg = buffer.getvalue()
            writer.append(MODE_JPEG, SIZE, SIZE, bytes(len(jpeg)) if index in (4, 5, 12) else jpeg, index)
    return path


@pytest.mark.parametrize("batch_size", [1, 5, 20])
def test_bad_samples_that_the_loader_passes_over_are_left_out(damaged, normalise, batch_size):
    options = {"seed": 0, "workers": 1, "decoder": installed_decoder(), "on_bad_sample": "skip"}
    loader = ViewLoader(damaged, [CropSpec(SIZE, None)], **options)
    found = extract(Network(), loader, normalise, batch_size)
    sound = [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]
    assert found.indices.tolist() == found.labels.tolist() == sound
    options = {"rank": 0, "world_size": 1, "device": CPU}
    order = np.array([5, 11, 12, 6])
    parts = encode_batches(Network(), loader, normalise, order, batch_size=batch_size, **options)
    features, labels, indices = (torch.cat(column) for column in zip(*parts, strict=True))
    assert indices.tolist() == labels.tolist() == [11, 6]
    assert torch.equal(features, found.features[[sound.index(11), sound.index(6)]])


def test_half_precision_features_come_back_in_float32(loader, normalise):
    network = Network()
    found = extract(lambda images: network(images).bfloat16(), loader, normalise, 10)
    assert found.features.dtype == torch.float32
