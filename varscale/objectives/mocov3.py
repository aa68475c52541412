"""MoCo v3: the student's queries of one view against the momentum teacher's keys of another, over the global batch."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from varscale.objectives.centroids import at_least_float32
from varscale.objectives.collapse import direction_moments, normalised
from varscale.objectives.contrast import mean_contrast
from varscale.objectives.gathering import first_row, gather_rows
from varscale.objectives.supcon import check_temperature
from varscale.objectives.views import check_latents, ordered_pairs


def mocov3_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The MoCo v3 loss (eq. 1 and algorithm 1) of this rank's samples, a mean over them: ctr(q_a, k_b) + ctr(q_b, k_a),

        ctr(q, k) = -2 tau log( exp(q_i.k_i / tau) / sum_j exp(q_i.k_j / tau) )

    for the views a and b, with q and k normalised and j over the samples of all ranks. With more views it is twice the
    average over ordered pairs a != b. Keys carry no gradient, so that nothing but the keys is exchanged, in one
    all-gather, and the average over ranks of the gradients is the gradient of the global batch's mean.

    Args:
        student: one tensor a view: the predictor's output, (N, d) float, with N the same on every rank; below float32
            it is computed in float32.
        teacher: likewise, the teacher's projections of the same views, or, in multi-crop training, of the first.
        temperature: tau.
        group: the ranks of the global batch; None is the default process group where one is initialised, else this
            process alone.

    Returns:
        The loss, a scalar in float32 (float64 for float64 input), and its terms, detached: `cosine` between queries and
        their keys, and the `direction_moments` of the queries.

    Raises:
        ValueError: an argument of another type, shape or range.

    Source: An Empirical Study of Training Self-Supervised Vision Transformers, arXiv 2104.02057.
    """
    check_temperature(temperature)
    check_latents(student, teacher)
    with torch.autocast(student[0].device.type, enabled=False):
        queries = [normalised(at_least_float32(view)) for view in student]
        with torch.no_grad():
            mine = torch.stack([normalised(at_least_float32(view)) for view in teacher], dim=1)
            keys = gather_rows(mine, group).unbind(dim=1)
        samples = torch.arange(len(keys[0]), device=mine.device)
        own = samples[first_row(mine, group) :][: len(mine)]
        pairs = [
            mean_contrast(queries[a], keys[b].contiguous(), own, samples, temperature=temperature)
            for a, b in ordered_pairs(student, teacher)
        ]
        losses, cosines = (torch.stack(values) for values in zip(*pairs, strict=True))
        return 4 * temperature * losses.mean(), {"cosine": cosines.mean(), **direction_moments(queries)}
