"""The networks that are trained: an encoder with the heads its objective needs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varscale.models.heads import Gaussian, GaussianHead, ProjectionHead, at_least_float32, batch_normalised_mlp


class HeadedNetwork(nn.Module):
    """images (N, 3, H, W), of one size or of several -> what the head makes of their features: embeddings or logits."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, *images: Tensor) -> Tensor:
        return self.head(encode(self.encoder, images))


class StudentNetwork(nn.Module):
    """images (N, 3, H, W), of one size or of several -> latents (N, d), or with a Gaussian head `Gaussian` of them.

    In float32 at least. The teacher has no predictor.
    """

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module | None, gaussian: nn.Module | None
    ):
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor
        self.gaussian = gaussian

    def forward(self, *images: Tensor) -> Tensor | Gaussian:
        latents = self.projector(encode(self.encoder, images))
        if self.predictor is not None:
            latents = self.predictor(latents)
        return at_least_float32(latents) if self.gaussian is None else self.gaussian(latents)


def encode(encoder: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """The features of images of several sizes, one size after the other: (N, feature_dim).

    Batch normalisation takes its statistics for each size by itself, as multi-crop training does (SwAV's,
    arXiv 2006.09882).
    """
    features = [encoder(part) for part in images]
    return features[0] if len(features) == 1 else torch.cat(features)


def build_embedding_network(
    encoder: nn.Module, *, embedding_dim: int = 128, projector_hidden: int | None = None
) -> HeadedNetwork:
    """`encoder` with a freshly initialised `ProjectionHead` to unit-norm embeddings of width `embedding_dim`."""
    return HeadedNetwork(encoder, ProjectionHead(encoder.feature_dim, embedding_dim, projector_hidden))


def build_classifier(encoder: nn.Module, num_classes: int) -> HeadedNetwork:
    """`encoder` with a freshly initialised linear layer to logits, (N, num_classes)."""
    return HeadedNetwork(encoder, nn.Linear(encoder.feature_dim, num_classes))


def build_student_network(
    encoder: nn.Module,
    *,
    latent_dim: int = 256,
    projector_hidden: int = 4096,
    predictor: bool = True,
    predictor_hidden: int = 4096,
    gaussian: bool = False,
    normalise_latents: bool = False,
    normalise_predictions: bool | None = None,
    output_bias: bool = True,
    sync_batch_norm: bool = True,
) -> StudentNetwork:
    """The student: `encoder` with a freshly initialised projector and, where wanted, predictor and Gaussian head.

    The default widths are BYOL's: the projector maps feature_dim to latent_dim through projector_hidden
    units, the predictor latent_dim to itself through predictor_hidden. normalise_latents: a batch normalisation behind
    the projector, so that no mean that all samples share can grow; normalise_predictions: behind the predictor, as
    behind the projector where it is None. output_bias: of the last linear layers of both.
    """
    if normalise_predictions is None:
        normalise_predictions = normalise_latents
    shared = {"output_bias": output_bias, "sync_batch_norm": sync_batch_norm}
    return StudentNetwork(
        encoder,
        batch_normalised_mlp(
            encoder.feature_dim, projector_hidden, latent_dim, normalise_output=normalise_latents, **shared
        ),
        batch_normalised_mlp(latent_dim, predictor_hidden, latent_dim, normalise_output=normalise_predictions, **shared)
        if predictor
        else None,
        GaussianHead(latent_dim) if gaussian else None,
    )
