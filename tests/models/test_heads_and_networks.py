"""Heads give unit-norm embeddings and Gaussians in float32 at least; networks put them together in order."""

import pytest
import torch
from torch import nn

from varscale.models.encoders import build_encoder
from varscale.models.heads import GaussianHead, ProjectionHead, batch_normalised_mlp
from varscale.models.networks import build_classifier, build_embedding_network, build_student_network
from varscale.models.norm import SyncBatchNorm


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_head_is_the_normalised_mlp(dtype: torch.dtype) -> None:
    head = ProjectionHead(20, 8).to(dtype)
    features = torch.randn(5, 20, dtype=dtype)
    first, _, second = head
    outputs = second(first(features).relu())
    embeddings = head(features)
    assert embeddings.dtype == dtype
    torch.testing.assert_close(embeddings, outputs / outputs.norm(dim=1, keepdim=True))
    assert [tuple(p.shape) for p in head.parameters()] == [(20, 20), (20,), (8, 20), (8,)]


def test_projection_head_normalises_in_float32_under_autocast() -> None:
    head = ProjectionHead(64, 128)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = head(torch.randn(50, 64))
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(50), rtol=0, atol=1e-6)


def test_projection_of_a_zero_vector_is_zero_with_a_finite_gradient() -> None:
    head = ProjectionHead(4, 3)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    embeddings = head(torch.randn(2, 4))
    embeddings.sum().backward()
    assert embeddings.eq(0).all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_batch_normalised_mlp_layers() -> None:
    layers = batch_normalised_mlp(10, 30, 7)
    assert [type(layer) for layer in layers] == [nn.Linear, SyncBatchNorm, nn.ReLU, nn.Linear]
    assert type(batch_normalised_mlp(10, 30, 7, sync_batch_norm=False)[1]) is nn.BatchNorm1d
    assert layers(torch.randn(4, 10)).shape == (4, 7)


def test_normalised_latents_have_no_common_mean(images: torch.Tensor) -> None:
    encoder = build_encoder("resnet18", image_size=32)
    sizes = {"latent_dim": 12, "projector_hidden": 24, "predictor_hidden": 20}
    network = build_student_network(encoder, **sizes, normalise_latents=True)
    nn.init.constant_(network.projector[3].bias, 10.0)
    projected = network.projector(network.encoder(images))
    for latents in (projected, network.predictor(projected)):
        torch.testing.assert_close(latents.mean(0), torch.zeros(12), rtol=0, atol=1e-5)
        assert latents.std(0).min() > 0.5
    assert network.predictor[4].weight is None
    assert build_student_network(encoder, **sizes).projector[-1].out_features == 12


def test_gaussian_head_starts_with_variances_around_one() -> None:
    torch.manual_seed(0)
    latents = batch_normalised_mlp(512, 1024, 256)(torch.randn(64, 512))
    gaussian = GaussianHead(256)(latents)
    assert gaussian.mean.shape == gaussian.logvar.shape == (64, 256)
    assert gaussian.logvar.mean().abs() < 0.02
    assert 0.005 < gaussian.logvar.std() < 0.05


def test_varcon_network(images: torch.Tensor) -> None:
    network = build_embedding_network(build_encoder("resnet18", stem="cifar", image_size=32), embedding_dim=16)
    embeddings = network(images)
    assert embeddings.shape == (6, 16)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6))
    network.eval()
    torch.testing.assert_close(network(images), network.head(network.encoder(images)))


@pytest.mark.parametrize("predictor", [True, False])
def test_vssl_network(images: torch.Tensor, predictor: bool) -> None:
    encoder = build_encoder("resnet18", stem="cifar", image_size=32)
    options = {
        "latent_dim": 12,
        "projector_hidden": 24,
        "predictor_hidden": 20,
        "predictor": predictor,
        "gaussian": True,
    }
    network = build_student_network(encoder, **options).eval()
    latents = network.projector(network.encoder(images))
    if predictor:
        assert network.predictor[0].weight.shape == (20, 12)
        latents = network.predictor(latents)
    else:
        assert network.predictor is None
    mean, logvar = network(images)
    torch.testing.assert_close(mean, network.gaussian.mean(latents))
    torch.testing.assert_close(logvar, network.gaussian.logvar(latents))
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = network(images)
    assert mean.dtype == logvar.dtype == torch.float32


def test_student_without_a_gaussian_head_gives_latents_in_float32(images: torch.Tensor) -> None:
    encoder = build_encoder("resnet18", stem="cifar", image_size=32)
    sizes = {"latent_dim": 12, "projector_hidden": 24, "predictor_hidden": 20}
    network = build_student_network(encoder, **sizes, normalise_latents=True, normalise_predictions=False).eval()
    assert network.gaussian is None
    assert [type(layer) for layer in network.predictor] == [nn.Linear, SyncBatchNorm, nn.ReLU, nn.Linear]
    assert type(network.projector[-1]) is SyncBatchNorm
    expected = network.predictor(network.projector(network.encoder(images)))
    torch.testing.assert_close(network(images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(images).dtype == torch.float32


def test_classifier_is_one_linear_layer(images: torch.Tensor) -> None:
    network = build_classifier(build_encoder("resnet18", stem="cifar", image_size=32), 7).eval()
    assert type(network.head) is nn.Linear
    torch.testing.assert_close(network(images), network.head(network.encoder(images)))
    assert network(images).shape == (6, 7)


def test_projection_head_of_another_width() -> None:
    assert [tuple(p.shape) for p in ProjectionHead(20, 8, 30).parameters()] == [(30, 20), (30,), (8, 30), (8,)]


def test_defaults_are_byols_widths() -> None:
    with torch.device("meta"):
        network = build_student_network(build_encoder("resnet50", image_size=224), gaussian=True)
    assert network.projector[0].weight.shape == (4096, 2048)
    assert network.projector[3].weight.shape == (256, 4096)
    assert network.predictor[0].weight.shape == (4096, 256)
    assert network.gaussian.logvar.weight.shape == (256, 256)
