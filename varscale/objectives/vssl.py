"""VSSL, variational self-supervised learning: the student's Gaussian on one view against the teacher's on another."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from varscale.objectives.collapse import cosine, direction_moments
from varscale.objectives.views import check_views, ordered_pairs


class Gaussian(NamedTuple):
    """A diagonal Gaussian per sample; wherever one is expected a plain pair (mean, logvar) will do."""

    mean: Tensor
    """(N, d) float."""
    logvar: Tensor
    """(N, d) float: logarithm of the variance."""


def vssl_loss(
    student: Sequence[Gaussian],
    teacher: Sequence[Gaussian],
    *,
    distance: str = "cosine",
    kl_weight: float = 1.0,
    likelihood_weight: float = 1.0,
    prior_weight: float = 0.0,
    logvar_bounds: tuple[float, float] = (-6.0, 2.0),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The VSSL loss of a batch seen in two or more views, averaged over samples and ordered pairs of views.

    For one pair the teacher's Gaussian p_t on view b is the prior, the student's q_s on view a the posterior:

        L = kl_weight KL(q_s || p_t) + likelihood_weight E_{z~p_t}[-log q_s(z)] + prior_weight KL(q_s || N(0, I))

    in closed form (`_euclidean_terms`, `_cosine_terms`), averaged over all pairs a != b: with two views, half the sum
    over both orders. The teacher carries no gradient. Of the likelihoods that could replace reconstruction this one
    keeps the variances in place: its optimum has var_s = sqrt(var_t (var_t + delta^2)) >= var_t for a distance delta
    between means, where E_{q_s}[-log p_t] would halve the variance of a moving teacher again and again. The bounds on
    logvar hold that slow upward drift.

    Loss and terms are plain means over this process's samples: with equally many samples on each rank, the average over
    ranks of the gradients is the gradient of the global batch's loss, and nothing needs to be exchanged.

    Args:
        student: one Gaussian a view, `mean` and `logvar` (N, d) float; below float32 they are computed in float32.
        teacher: likewise, for the same views of the same samples, or, in multi-crop training, for the first of them.
        distance: "cosine" or "euclidean", the distance between means.
        kl_weight, likelihood_weight, prior_weight: at least 0.
        logvar_bounds: lower and upper bound of `soft_clamp` on every logvar.

    Returns:
        The loss, a scalar in float32 (float64 for float64 input), and its terms, detached: the scalars `kl` and `nll`;
        `prior` where it has a weight; `cosine` between the student's and teacher's means; `logvar_mean`, `logvar_min`,
        `logvar_max` of the student, after the bounds; and the `direction_moments` of the student's means.

    Raises:
        ValueError: an argument of another type, shape or range.

    Source: Variational Self-Supervised Learning, arXiv 2504.04318, for the two views, the KL, the symmetry and the
    cross-view likelihood; the cosine forms, the bounds and the weights are this project's own.
    """
    weights = {"kl_weight": kl_weight, "likelihood_weight": likelihood_weight, "prior_weight": prior_weight}
    _check_options(distance, weights, logvar_bounds)
    student, teacher = [Gaussian(*view) for view in student], [Gaussian(*view) for view in teacher]
    check_views(*([{f".{name}": t for name, t in v._asdict().items()} for v in views] for views in (student, teacher)))
    with torch.autocast(student[0].mean.device.type, enabled=False):
        student = [_bounded(view, logvar_bounds) for view in student]
        teacher = [_bounded(Gaussian(view.mean.detach(), view.logvar.detach()), logvar_bounds) for view in teacher]
        pairs = [_DISTANCES[distance](student[a], teacher[b]) for a, b in ordered_pairs(student, teacher)]
        kl, nll = (torch.stack(term).mean() for term in zip(*pairs, strict=True))
        loss = kl_weight * kl + likelihood_weight * nll
        terms = {"kl": kl, "nll": nll}
        if prior_weight:
            terms["prior"] = torch.stack([_prior_term(view, distance) for view in student]).mean()
            loss = loss + prior_weight * terms["prior"]
        terms |= _diagnostics(student, teacher)
    return loss, {name: term.detach() for name, term in terms.items()}


def soft_clamp(values: Tensor, low: float, high: float) -> Tensor:
    """Smooth clamp into [low, high]: near the identity inside, with a gradient that fades but survives outside.

    With u the distance from the middle in units of half the range, u -> u (1 + u^4)^(-1/4): within 1.5 % of u up to
    |u| = 1/2, 0.84 at the bounds, and of slope |u|^-5 far outside, where the slope of a sigmoid or a softplus has
    long underflowed to zero.

    Args:
        values: of any shape, float.
    """
    middle, half = (low + high) / 2, (high - low) / 2
    scaled = (values - middle) / half
    outside = scaled.abs() > 1
    # Two forms of one function: the first loses its derivative to cancellation at large |u|, the second divides by u.
    # Each is given only values it can differentiate, since `where` would pass on the NaN of the branch not taken.
    inner = scaled.clamp(-1, 1)
    outer = scaled.where(outside, 1.0)
    inner = inner * (1 + inner**4) ** -0.25
    outer = outer.sign() * (1 + outer**-4) ** -0.25
    return middle + half * torch.where(outside, outer, inner)


def _euclidean_terms(student: Gaussian, teacher: Gaussian) -> tuple[Tensor, Tensor]:
    """KL(q_s || p_t) and E_{z~p_t}[-log q_s(z)] of the Gaussians themselves: summed over dimensions, in nats."""
    difference = student.logvar - teacher.logvar
    squared_distance = (student.mean - teacher.mean).square()
    kl = (difference.exp() - difference - 1 + squared_distance * (-teacher.logvar).exp()) / 2
    nll = (
        math.log(2 * math.pi) + student.logvar + (-difference).exp() + squared_distance * (-student.logvar).exp()
    ) / 2
    return kl.sum(dim=1).mean(), nll.sum(dim=1).mean()


def _cosine_terms(student: Gaussian, teacher: Gaussian) -> tuple[Tensor, Tensor]:
    """The same with 2 (1 - cos) for the squared distance of the means: averaged over dimensions, less constants."""
    difference = student.logvar - teacher.logvar
    half_squared_distance = 1 - cosine(student.mean, teacher.mean)
    kl = (difference.exp() - difference - 1).mean(dim=1) / 2 + half_squared_distance * (-teacher.logvar).exp().mean(1)
    nll = (student.logvar + (-difference).exp()).mean(dim=1) / 2
    nll = nll + half_squared_distance * (-student.logvar).exp().mean(dim=1)
    return kl.mean(), nll.mean()


_DISTANCES = {"cosine": _cosine_terms, "euclidean": _euclidean_terms}


def _prior_term(student: Gaussian, distance: str) -> Tensor:
    """KL(q_s || N(0, I)): like the other terms, summed over dimensions if euclidean and averaged if cosine."""
    kl = (student.logvar.exp() - student.logvar - 1 + student.mean.square()) / 2
    return (kl.sum(dim=1) if distance == "euclidean" else kl.mean(dim=1)).mean()


@torch.no_grad()
def _diagnostics(student: Sequence[Gaussian], teacher: Sequence[Gaussian]) -> dict[str, Tensor]:
    """The terms that show a collapse; see `vssl_loss`."""
    pairs = ordered_pairs(student, teacher)
    logvar = torch.stack([view.logvar for view in student])
    return {
        "cosine": torch.stack([cosine(student[a].mean, teacher[b].mean).mean() for a, b in pairs]).mean(),
        "logvar_mean": logvar.mean(),
        "logvar_min": logvar.min(),
        "logvar_max": logvar.max(),
        **direction_moments([view.mean for view in student]),
    }


def _bounded(view: Gaussian, logvar_bounds: tuple[float, float]) -> Gaussian:
    """`view` in float32 at least, with the logvar inside its bounds."""
    dtype = torch.promote_types(torch.promote_types(view.mean.dtype, view.logvar.dtype), torch.float32)
    return Gaussian(view.mean.to(dtype), soft_clamp(view.logvar.to(dtype), *logvar_bounds))


def _check_options(distance: str, weights: dict[str, float], logvar_bounds: tuple[float, float]) -> None:
    if distance not in _DISTANCES:
        raise ValueError(f"distance: expected one of {', '.join(_DISTANCES)}, found {distance!r}")
    for name, weight in weights.items():
        if not (0 <= weight < math.inf):
            raise ValueError(f"{name}: expected a finite number of at least 0, found {weight}")
    low, high = logvar_bounds
    if not (-math.inf < low < high < math.inf):
        raise ValueError(f"logvar_bounds: expected finite (low, high) with low < high, found {logvar_bounds}")
