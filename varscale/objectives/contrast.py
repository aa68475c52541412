"""Anchors against candidates of which some are positives: what SupCon, NT-Xent and MoCo v3 have in common."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from varscale.objectives.blocks import row_blocks


def mean_contrast(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    *,
    temperature: float,
    first_own: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean over anchors i, with A(i) its candidates and P(i) those of its label, of

        log sum_{a in A(i)} exp(z_i.z_a / tau) - 1/|P(i)| sum_{p in P(i)} z_i.z_p / tau

    An anchor without any positive contributes 0, and counts in the mean. The logits are made once, block by block, and
    none is kept: the gradient of a mean is known as soon as they are, two (N, D) and (M, D) tensors.

    Args:
        anchors: (N, D) float32 or float64.
        candidates: (M, D) of the same dtype.
        anchor_labels, candidate_labels: (N,) and (M,) int64.
        first_own: where among the candidates the first anchor stands, followed by the others: none of them is its own
            candidate. None where the anchors are not among the candidates.

    Returns:
        The scalar, and (N,) the mean of z_i.z_p over P(i), without gradient; 0 where P(i) is empty.
    """
    return _MeanContrast.apply(anchors, candidates, anchor_labels, candidate_labels, temperature, first_own)


class _MeanContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        anchor_labels: Tensor,
        candidate_labels: Tensor,
        temperature: float,
        first_own: int | None,
    ) -> tuple[Tensor, Tensor]:
        scaled = anchors / temperature
        losses, positive = scaled.new_empty(len(scaled)), scaled.new_empty(len(scaled))
        grad_anchors = torch.empty_like(scaled) if ctx.needs_input_grad[0] else None
        grad_candidates = torch.zeros_like(candidates) if ctx.needs_input_grad[1] else None
        for block in row_blocks(len(scaled), len(candidates), scaled.device):
            logits = scaled[block] @ candidates.T
            is_positive = anchor_labels[block].unsqueeze(1) == candidate_labels
            if first_own is not None:
                own = torch.arange(block.start, block.stop, device=scaled.device).unsqueeze(1) + first_own
                logits.scatter_(1, own, -torch.inf)
                is_positive.scatter_(1, own, False)
            count = is_positive.sum(dim=1, keepdim=True)
            share = 1 / count.clamp(min=1).to(logits.dtype)
            positive[block] = logits.where(is_positive, 0).sum(dim=1) * share.squeeze(1)

            # A lone anchor has no candidate: the bounds turn its -inf - -inf and 0 / 0 into 0, and change no other.
            largest = logits.amax(dim=1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
            p = logits.sub_(largest).exp_()
            total = p.sum(dim=1, keepdim=True).clamp(min=1)
            losses[block] = ((largest + total.log()).squeeze(1) - positive[block]).where(count.squeeze(1) > 0, 0)
            if grad_anchors is None and grad_candidates is None:
                continue
            slope = p.div_(total).sub_(is_positive * share).mul_(count > 0).div_(len(scaled))
            if grad_anchors is not None:
                grad_anchors[block] = slope @ candidates
            if grad_candidates is not None:
                grad_candidates.addmm_(slope.T, scaled[block])
        ctx.save_for_backward(grad_anchors, grad_candidates)
        ctx.temperature = temperature
        positive *= temperature
        ctx.mark_non_differentiable(positive)
        return losses.mean(), positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_anchors, grad_candidates = ctx.saved_tensors
        if grad_anchors is not None:
            grad_anchors = grad_anchors * (grad_loss / ctx.temperature)
        if grad_candidates is not None:
            grad_candidates = grad_candidates * grad_loss
        return grad_anchors, grad_candidates, None, None, None, None
