"""BYOL, bootstrap your own latent: the student's prediction for one view against the teacher's latent of another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from varscale.objectives.centroids import at_least_float32
from varscale.objectives.collapse import cosine, direction_moments
from varscale.objectives.views import check_latents, ordered_pairs


def byol_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The BYOL loss (eq. 2, symmetrised) of a batch, a mean over samples:

        L = (2 - 2 cos(q(z_a), z'_b)) + (2 - 2 cos(q(z_b), z'_a))

    for the views a and b. With more views it is twice the average over ordered pairs a != b. The teacher carries no
    gradient. A plain mean over this process's samples: with equally many on each rank, the average over ranks of the
    gradients is the gradient of the global batch's loss, and nothing needs to be exchanged.

    Args:
        student: one tensor a view: the predictor's output, (N, d) float; below float32 it is computed in float32.
        teacher: likewise, the teacher's projections of the same views, or, in multi-crop training, of the first.

    Returns:
        The loss, a scalar in float32 (float64 for float64 input), and its terms, detached: `cosine` between student and
        teacher, and the `direction_moments` of the student's predictions.

    Raises:
        ValueError: an argument of another type or shape.

    Source: Bootstrap Your Own Latent, arXiv 2006.07733.
    """
    check_latents(student, teacher)
    with torch.autocast(student[0].device.type, enabled=False):
        student = [at_least_float32(view) for view in student]
        teacher = [at_least_float32(view.detach()) for view in teacher]
        pairs = [cosine(student[a], teacher[b]).mean() for a, b in ordered_pairs(student, teacher)]
        mean_cosine = torch.stack(pairs).mean()
        loss = 4 - 4 * mean_cosine
        return loss, {"cosine": mean_cosine.detach(), **direction_moments(student)}
