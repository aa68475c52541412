"""Cross-entropy with label smoothing: the supervised baseline."""

import torch
import torch.nn.functional as F
from torch import Tensor

from varscale.objectives.centroids import at_least_float32, check_batch


def cross_entropy_loss(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum_k t_k log softmax(logits)_k, a mean over samples, with t = (1 - s) onehot + s / C.

    Args:
        logits: (N, C) float; below float32 it is computed in float32.
        labels: (N,) integer, in [0, C).
        label_smoothing: s, in [0, 1).

    Returns:
        The loss, a scalar in float32 (float64 for float64 logits), and its term, detached: `top1`, the percentage of
        samples whose class has the greatest logit.

    Raises:
        ValueError: an argument of another type, shape or range.

    Source of label smoothing: Rethinking the Inception Architecture for Computer Vision, arXiv 1512.00567, section 7.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number from 0 to below 1, found {label_smoothing}")
    check_batch(logits, labels, logits.shape[-1])
    with torch.autocast(logits.device.type, enabled=False):
        loss = F.cross_entropy(at_least_float32(logits), labels.long(), label_smoothing=label_smoothing)
    hits = logits.detach().argmax(dim=1) == labels
    return loss, {"top1": 100 * hits.to(loss.dtype).mean()}
