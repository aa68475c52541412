"""Collapse, the failure of learning without negatives: how far the latents of a batch point apart."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def direction_moments(views: Sequence[Tensor]) -> dict[str, Tensor]:
    """What `spread` and `effective_rank` need of the latents (N, d) of each view: `direction` (V, d), each view's
    average of the normalised latent; `direction_square`, the average square of its norm; `direction_product` (d, d),
    the average over views of its products with itself."""
    directions = torch.stack([normalised(view) for view in views])
    rows = directions.flatten(0, 1)
    return {
        "direction": directions.mean(dim=1),
        "direction_square": directions.square().sum(dim=2).mean(),
        "direction_product": rows.T @ rows / len(rows),
    }


def spread(direction: Tensor, direction_square: Tensor) -> Tensor:
    """How far the latents of a batch point apart: 1 where evenly over the sphere, 0 after a collapse to one point.

    The standard deviation over samples of the normalised latent, sqrt(d) times its root mean square over dimensions and
    views. Within each view, since a constant difference between views would hide that all samples are alike.

    Args:
        direction, direction_square: from `direction_moments`, or their averages over the parts of a batch.
    """
    return (direction_square - direction.square().sum(dim=1).mean()).clamp(min=0).sqrt()


def effective_rank(direction: Tensor, direction_product: Tensor) -> Tensor:
    """In how many directions the normalised latents of a batch vary: exp of the entropy of their covariance's spectrum.

    1 where all lie on a line, d where evenly in all directions, 0 where they are one point. It tells of latents that
    have lost most dimensions while their `spread` is that of healthy ones. Within each view, as `spread`; at most the
    number of samples. Source: RankMe, arXiv 2210.02885, there of the singular values themselves.

    Args:
        direction, direction_product: from `direction_moments`, or their averages over the parts of a batch.
    """
    covariance = direction_product - direction.T @ direction / len(direction)
    variances = torch.linalg.eigvalsh(covariance.double()).clamp(min=0)
    total = variances.sum()
    rank = torch.special.entr(variances / total).sum().exp()
    return torch.where(total > torch.finfo(torch.float32).eps, rank, 0.0)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of the angle between rows, (N, d) and (N, d) -> (N,); 0, with zero gradient, where a row is zero."""
    return (normalised(first) * normalised(second)).sum(dim=1)


def normalised(vectors: Tensor) -> Tensor:
    """Rows of (N, d) scaled to unit norm; a row too short for its squares to be represented becomes the zero vector."""
    norm = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / norm.where(norm > math.sqrt(torch.finfo(norm.dtype).tiny), torch.inf)
