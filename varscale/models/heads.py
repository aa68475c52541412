"""The heads on top of the encoder: a projection to embeddings, and a student's projector, predictor and Gaussian."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varscale.models.norm import convert_batch_norm

INITIAL_LOGVAR_SCALE = 0.1


class Gaussian(NamedTuple):
    """Diagonal Gaussians: mean (N, d) and logvar (N, d), the natural logarithm of the variance, not yet bounded."""

    mean: Tensor
    logvar: Tensor


class ProjectionHead(nn.Sequential):
    """Features (N, d) -> embeddings (N, D): Linear(d, h), ReLU, Linear(h, D), then unit norm.

    That of VarCon, SupCon and SimCLR. hidden_dim: h; d where it is None. The norm is taken in float32 at least,
    whatever the precision of the layers; a zero vector stays zero.
    """

    def __init__(self, feature_dim: int, embedding_dim: int = 128, hidden_dim: int | None = None):
        hidden_dim = hidden_dim or feature_dim
        super().__init__(
            nn.Linear(feature_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, embedding_dim)
        )

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(at_least_float32(super().forward(features)), dim=1)


def batch_normalised_mlp(
    in_dim: int,
    hidden_dim: int,
    out_dim: int,
    *,
    normalise_output: bool = False,
    output_bias: bool = True,
    sync_batch_norm: bool = True,
) -> nn.Sequential:
    """Linear-BN-ReLU-Linear, (N, in_dim) -> (N, out_dim): projector and predictor, after BYOL.

    The first layer has no bias: batch normalisation would subtract it again. normalise_output: a batch normalisation
    without scale and shift behind it. MoCo v3's code (arXiv 2104.02057) has that and no output_bias.
    """
    layers = nn.Sequential(
        nn.Linear(in_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim, bias=output_bias),
    )
    if normalise_output:
        layers.append(nn.BatchNorm1d(out_dim, affine=False))
    return convert_batch_norm(layers) if sync_batch_norm else layers


class GaussianHead(nn.Module):
    """Two linear layers, (N, d) -> `Gaussian` of (N, d) and (N, d), in float32 at least.

    The logvar layer starts at a tenth of torch's weights and without bias, so that all variances start near 1 (this
    project's choice). The loss weighs every sample by its inverse variances; at torch's own scale a few small ones may
    rule it early on: a conjecture from one pair of runs (benchmarks/digits.md). The weights must not start at
    zero: LARS moves a weight in proportion to its norm, so they would stay there.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.mean = nn.Linear(dim, dim)
        self.logvar = nn.Linear(dim, dim)
        nn.init.zeros_(self.logvar.bias)
        with torch.no_grad():
            self.logvar.weight.mul_(INITIAL_LOGVAR_SCALE)

    def forward(self, latents: Tensor) -> Gaussian:
        return Gaussian(at_least_float32(self.mean(latents)), at_least_float32(self.logvar(latents)))


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32, or unchanged where they are float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
