"""VarCon, variational supervised contrastive learning: the loss of a global batch against its class centroids."""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from varscale.objectives.blocks import row_blocks
from varscale.objectives.centroids import ClassStatistics, at_least_float32, check_batch, class_statistics

# At tau2 = 1e-4 the target is one-hot to the last bit, exp(-10000) being zero in float64 too: a smaller tau2 changes
# nothing but would overflow in the derivative of 1 / tau2.
SMALLEST_TAU2 = 1e-4


def varcon_loss(
    embeddings: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.02,
    detach_target: bool = False,
    detach_centroids: bool = True,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The VarCon loss (eq. 7) of this rank's samples against the class centroids of the global batch.

    A plain mean over local samples: with equally many samples on each rank, the average over ranks of its gradients is
    the gradient of the loss of the global batch. For the definition and the terms see `varcon_loss_from_statistics`.

    Args:
        embeddings: (N, D) float, unit-norm; all views of this rank's images. Below float32 it is computed in float32.
        labels: (N,) integer, in [0, num_classes).
        num_classes: classes of the data set; absent ones take no part.
        temperature: tau1.
        epsilon: half the range of the confidence-adaptive temperature tau2; 0 fixes it at tau1.
        detach_target: hold the target q fixed: no gradient through tau2 and the confidence.
        detach_centroids: no gradient through the centroids w_r. The paper's choice; without it gradients also cross
            ranks, in one more all-reduce of the class statistics' size.
        group: the ranks of the global batch; None is the default process group where one is initialised, else this
            process alone.

    Returns:
        The loss, a scalar in float32 (float64 for float64 embeddings), and its terms.

    Raises:
        ValueError: an argument of another type, shape or range.

    Source: Variational Supervised Contrastive Learning, arXiv 2506.07413.
    """
    _check_temperatures(temperature, epsilon)
    with torch.autocast(embeddings.device.type, enabled=False):
        statistics = class_statistics(
            embeddings.detach() if detach_centroids else embeddings, labels, num_classes, group=group
        )
    return varcon_loss_from_statistics(
        embeddings, labels, statistics, temperature=temperature, epsilon=epsilon, detach_target=detach_target
    )


def varcon_loss_from_statistics(
    embeddings: Tensor,
    labels: Tensor,
    statistics: ClassStatistics,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.02,
    detach_target: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The VarCon loss (eq. 7) of some samples against given class statistics, averaged over these samples.

    For one embedding z of class r, with w_k the centroids of the C_b classes present:

        p(k|z)  = exp(z.w_k / tau1) / sum_j exp(z.w_j / tau1)           (eq. 8)
        tau2(z) = (tau1 - epsilon) + 2 epsilon p(r|z)                   (eq. 13)
        q(k|z)  proportional to exp(1/tau2) for k = r and to 1 else     (eqs. 10-12)
        L(z)    = KL(q || p) - log p(r|z)                               (eq. 7)

    q has the same value, b = q(k|z), on all classes k != r. With a = q(r|z), their mass m = 1 - a = (C_b - 1) b and
    their mean log-probability g = mean over k != r of log p(k|z),

        KL(q || p) = a (log a - log p(r|z)) + m (log b - g)
        log p(r|z) = z.w_r / tau1 - lse
        g          = (z.(sum_k w_k) / tau1 - z.w_r / tau1) / (C_b - 1) - lse

    so that a row of C_b logits is needed for lse, the logarithm of its sum of exponentials, and for nothing else.
    exp(1/tau2), which overflows, is never formed: log a = logsigmoid(1/tau2 - log(C_b - 1)) and
    log b = -logaddexp(1/tau2, log(C_b - 1)). With one class present the loss and its gradient are 0.

    Where gradient accumulation must see the centroids of the whole step, add the `local_statistics` of its
    micro-batches, `all_reduce` them once, and call this for each micro-batch.

    Args:
        embeddings, labels, temperature, epsilon, detach_target: as in `varcon_loss`.
        statistics: of a batch that has samples of every class in `labels`, exchanged between ranks.

    Returns:
        The loss and its terms, detached: `kl` and `nll`, the scalar means of KL(q || p) and of -log p(r|z), whose sum
        is the loss; `tau2` and `confidence`, p(r|z), of shape (N,); `classes_present`, C_b, a scalar int64.

    Raises:
        ValueError: an argument of another type, shape or range.
    """
    _check_temperatures(temperature, epsilon)
    check_batch(embeddings, labels, statistics.num_classes)
    if statistics.sums.shape[1] != embeddings.shape[1] or statistics.totals.device != embeddings.device:
        raise ValueError(
            f"statistics: expected sums of shape (K, {embeddings.shape[1]}) on {embeddings.device}, found "
            f"{tuple(statistics.sums.shape)} on {statistics.totals.device}"
        )
    with torch.autocast(embeddings.device.type, enabled=False):
        scaled = at_least_float32(embeddings) / temperature
        centroids = statistics.centroids().to(scaled.dtype)
        classes_present = statistics.present.sum()
        rows = statistics.rows(labels.long())

        lse, own_logit = _ClassLogits.apply(scaled, centroids, statistics.present, rows)
        log_p = own_logit - lse
        others = classes_present - 1
        log_p_others = (scaled @ centroids.sum(dim=0) - own_logit) / others.clamp(min=1) - lse

        confidence = log_p.exp()
        tau2 = (temperature - epsilon) + 2 * epsilon * confidence
        sharpness = (tau2.detach() if detach_target else tau2).clamp(min=SMALLEST_TAU2).reciprocal()
        log_others = others.to(scaled.dtype).log()
        mass_others = torch.sigmoid(log_others - sharpness)
        log_q = F.logsigmoid(sharpness - log_others)
        log_q_other = -torch.logaddexp(sharpness, log_others)

        kl = (log_q.exp() * (log_q - log_p) + mass_others * (log_q_other - log_p_others)).mean()
        nll = -log_p.mean()
    terms = {"kl": kl, "nll": nll, "tau2": tau2, "confidence": confidence, "classes_present": classes_present}
    return kl + nll, {name: term.detach() for name, term in terms.items()}


class _ClassLogits(torch.autograd.Function):
    """Per sample, the log-sum-exp of its logits over classes present and the logit of its own class.

    The gradient of lse with respect to z/tau1 is the mean centroid under p(.|z), an (N, D) tensor that one more product
    gives while a block of probabilities is at hand. So the logits are made once, block by block, and none is kept.
    """

    @staticmethod
    def forward(ctx: Any, scaled: Tensor, centroids: Tensor, present: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`scaled`: (N, D) z/tau1; `centroids`: (K, D); `present`: (K,) bool; `rows`: (N,) own class -> (N,), (N,)."""
        absent = torch.zeros_like(present, dtype=scaled.dtype).masked_fill_(~present, -torch.inf)
        mean_centroid = torch.empty_like(scaled) if ctx.needs_input_grad[0] else None
        lse, own_logit = scaled.new_empty(len(scaled)), scaled.new_empty(len(scaled))
        for block in row_blocks(len(scaled), len(centroids), scaled.device):
            logits = torch.addmm(absent, scaled[block], centroids.T)
            own_logit[block] = logits.gather(1, rows[block].unsqueeze(1)).squeeze(1)
            largest = logits.amax(dim=1, keepdim=True)
            exponentials = logits.sub_(largest).exp_()
            total = exponentials.sum(dim=1, keepdim=True)
            lse[block] = (largest + total.log()).squeeze(1)
            if mean_centroid is not None:
                mean_centroid[block] = (exponentials @ centroids) / total
        ctx.save_for_backward(scaled, centroids, absent, rows, lse, mean_centroid)
        return lse, own_logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_lse: Tensor, grad_own: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        scaled, centroids, absent, rows, lse, mean_centroid = ctx.saved_tensors
        grad_scaled = grad_centroids = None
        with torch.autocast(scaled.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_scaled = grad_lse.unsqueeze(1) * mean_centroid + grad_own.unsqueeze(1) * centroids[rows]
            if ctx.needs_input_grad[1]:
                grad_centroids = torch.zeros_like(centroids).index_add_(0, rows, grad_own.unsqueeze(1) * scaled)
                for block in row_blocks(len(scaled), len(centroids), scaled.device):
                    log_p = torch.addmm(absent, scaled[block], centroids.T).sub_(lse[block].unsqueeze(1))
                    grad_centroids += log_p.exp_().mul_(grad_lse[block].unsqueeze(1)).T @ scaled[block]
        return grad_scaled, grad_centroids, None, None


def _check_temperatures(temperature: float, epsilon: float) -> None:
    if not (0 < temperature < math.inf):
        raise ValueError(f"temperature: expected a finite number above 0, found {temperature}")
    if not (0 <= epsilon < temperature):
        raise ValueError(f"epsilon: expected 0 <= epsilon < temperature ({temperature}), found {epsilon}")
