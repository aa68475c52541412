"""The embedding of a trained network, rebuilt from its tensors: it is what the network itself gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from varscale.models.embedding import embedding_head
from varscale.models.networks import build_embedding_network, build_student_network


class Encoder(nn.Linear):
    feature_dim = 6

    def __init__(self):
        super().__init__(4, 6)


@pytest.fixture
def inputs() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(10, 4)


def test_varcons_projection(inputs):
    network = build_embedding_network(Encoder(), embedding_dim=5).eval()
    head = embedding_head(network.state_dict(), 6)
    torch.testing.assert_close(head(network.encoder(inputs)), network(inputs))


@pytest.mark.parametrize("predictor", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
def test_vssls_mean(inputs, predictor, normalise):
    network = build_student_network(
        Encoder(),
        latent_dim=5,
        projector_hidden=7,
        predictor=predictor,
        predictor_hidden=8,
        gaussian=True,
        normalise_latents=normalise,
        sync_batch_norm=False,
    )
    network(inputs)  # moves the running statistics
    network.eval()
    head = embedding_head(network.state_dict(), 6)
    torch.testing.assert_close(head(network.encoder(inputs)), F.normalize(network(inputs).mean))
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_a_projection_of_another_hidden_width(inputs):
    layers = nn.Sequential(nn.Linear(6, 11), nn.ReLU(), nn.Linear(11, 3))
    head = embedding_head({f"head.{key}": tensor for key, tensor in layers.state_dict().items()}, 6)
    features = torch.randn(5, 6)
    torch.testing.assert_close(head(features), F.normalize(layers(features)))


@pytest.mark.parametrize("normalise", [True, False])  # MoCo v3's and BYOL's
def test_a_projector_without_a_gaussian_is_the_embedding_itself(inputs, normalise):
    network = build_student_network(
        Encoder(),
        latent_dim=5,
        projector_hidden=7,
        predictor_hidden=8,
        normalise_latents=normalise,
        normalise_predictions=False,
        sync_batch_norm=False,
    )
    network(inputs)
    network.eval()
    features = network.encoder(inputs)
    expected = F.normalize(network.projector(features))
    torch.testing.assert_close(embedding_head(network.state_dict(), 6)(features), expected)


def test_a_network_with_nothing_behind_the_encoder_but_a_classifier_has_none():
    assert embedding_head({"encoder.weight": torch.ones(2), "head.weight": torch.ones(3, 6)}, 6) is None


def test_a_head_of_another_shape_is_none_of_ours():
    tensors = build_embedding_network(Encoder()).state_dict()
    assert embedding_head(tensors | {"head.0.weight": torch.ones(9, 6)}, 6) is None
    assert embedding_head(tensors | {"head.3.weight": torch.ones(9, 6)}, 6) is None
