"""SupCon, and NT-Xent as its case of one class an image: every view of the global batch against all others."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from varscale.objectives.centroids import at_least_float32, check_embeddings, check_labels
from varscale.objectives.contrast import mean_contrast
from varscale.objectives.gathering import first_row, gather_rows


def supcon_loss(
    embeddings: Tensor, labels: Tensor, *, temperature: float = 0.1, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The supervised contrastive loss L_out (eq. 2) of this rank's samples in the global batch, a mean over samples:

        L(i) = -1/|P(i)| sum_{p in P(i)} log( exp(z_i.z_p / tau) / sum_{a in A(i)} exp(z_i.z_a / tau) )

    with A(i) all samples of all ranks but i, and P(i) those of its label. With image numbers for labels, and two views
    of every image, it is SimCLR's NT-Xent (eq. 1 there). The paper sums over samples; its authors' code takes this
    mean, and multiplies it by temperature / 0.07. A sample that is alone with its label contributes 0 and counts in
    the mean, as in their code.

    Every sample's gradient has two parts, as anchor and as candidate of all others', which cross ranks: the average
    over ranks of the gradients is the gradient of the global batch's mean. Per call one all-gather of the embeddings
    and of the labels, and one reduce-scatter of the gradients; no rank repeats another's rows of logits.

    Args:
        embeddings: (N, D) float, unit-norm; all views of this rank's images, equally many on every rank. Below float32
            it is computed in float32.
        labels: (N,) integer: the class, or the number of the image in the data set.
        temperature: tau.
        group: the ranks of the global batch; None is the default process group where one is initialised, else this
            process alone.

    Returns:
        The loss, a scalar in float32 (float64 for float64 embeddings), and its terms, detached: `cosine`, the mean
        over samples of z_i.z_p averaged over P(i) (0 without positives), and `cosine_all`, that over A(i): near 1 where
        all embeddings have become one.

    Raises:
        ValueError: an argument of another type, shape or range.

    Source: Supervised Contrastive Learning, arXiv 2004.11362; A Simple Framework for Contrastive Learning of Visual
    Representations, arXiv 2002.05709.
    """
    check_temperature(temperature)
    check_embeddings(embeddings)
    check_labels(labels, embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):
        z, labels = at_least_float32(embeddings), labels.long()
        everyone, everyones_labels = gather_rows(z, group), gather_rows(labels, group)
        loss, positive = mean_contrast(
            z, everyone, labels, everyones_labels, temperature=temperature, first_own=first_row(z, group)
        )
        with torch.no_grad():
            others = (z @ everyone.sum(dim=0) - z.square().sum(dim=1)) / max(1, len(everyone) - 1)
    return loss, {"cosine": positive.mean(), "cosine_all": others.mean()}


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless it is finite and above 0."""
    if not (0 < temperature < math.inf):
        raise ValueError(f"temperature: expected a finite number above 0, found {temperature}")
