"""MoCo v3 equals pytorch-metric-learning and a transcription, in bounded memory; nothing reaches the teacher."""

import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor
from pytorch_metric_learning.losses import NTXentLoss

from varscale.objectives.blocks import LOGITS_PER_BLOCK
from varscale.objectives.mocov3 import mocov3_loss


def random_views(count, samples=9, width=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(samples, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count))
    return [view.requires_grad_() for view in draw]


def literal_ctr(q, k, temperature):
    """Algorithm 1's, with its constant."""
    logits = F.normalize(q) @ F.normalize(k.detach()).T / temperature
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(q)))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_it_equals_the_pseudo_code(temperature):
    q, k = random_views(2), random_views(2, seed=1)
    loss, terms = mocov3_loss(q, k, temperature=temperature)
    expected = literal_ctr(q[0], k[1], temperature) + literal_ctr(q[1], k[0], temperature)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(value, q) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    cosines = [F.cosine_similarity(q[a], k[1 - a]).mean() for a in (0, 1)]
    assert terms["cosine"].item() == pytest.approx(sum(cosines).item() / 2)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_it_equals_pytorch_metric_learning(temperature):
    """Its NT-Xent of queries against keys as references: of each pair of views, times 2 tau."""
    q, k = random_views(2), random_views(2, seed=1)
    contrast, samples = NTXentLoss(temperature), torch.arange(len(q[0]))
    expected = sum(contrast(q[a], samples, ref_emb=k[1 - a].detach(), ref_labels=samples.clone()) for a in (0, 1))
    loss, _ = mocov3_loss(q, k, temperature=temperature)
    torch.testing.assert_close(loss, 2 * temperature * expected, rtol=0, atol=1e-6)
    ours, theirs = (torch.autograd.grad(value, q) for value in (loss, 2 * temperature * expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_more_views_are_twice_the_average_over_ordered_pairs():
    q, k = random_views(3), random_views(2, seed=1)
    losses = [literal_ctr(q[a], k[b], 0.2) for a, b in [(0, 1), (1, 0), (2, 0), (2, 1)]]
    torch.testing.assert_close(mocov3_loss(q, k, temperature=0.2)[0], 2 * torch.stack(losses).mean())


def test_the_teacher_carries_no_gradient():
    q, k = random_views(2), random_views(2, seed=1)
    loss, terms = mocov3_loss(q, k)
    loss.backward()
    assert all(view.grad is None for view in k)
    assert all(view.grad.abs().sum() > 0 for view in q)
    assert not any(term.requires_grad for term in terms.values())


def test_no_tensor_holds_all_logits():
    q, k = (random_views(2, 4096, 128, seed, torch.float32) for seed in (0, 1))
    with LargestTensor() as largest:
        mocov3_loss(q, k)[0].backward()
    assert 4096 * 128 <= largest.elements <= LOGITS_PER_BLOCK < 4096 * 4096


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("constant", [0.0, 2.0, None])
def test_small_and_collapsed_batches_are_finite(samples, constant):
    q, k = (random_views(2, samples, 3, seed, torch.float32) for seed in (0, 1))
    if constant is not None:
        q = [torch.full_like(view, constant).requires_grad_() for view in q]
    loss, _ = mocov3_loss(q, k, temperature=1e-3)
    loss.backward()
    assert loss.isfinite()
    assert all(view.grad.isfinite().all() for view in q)
    if samples == 1:  # a key without rivals is found
        assert loss.item() == pytest.approx(0.0, abs=1e-9)


def test_half_precision_is_computed_in_float32():
    q, k = random_views(2, dtype=torch.bfloat16), random_views(2, seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = mocov3_loss(q, k)
    assert loss.dtype == torch.float32
    assert loss == mocov3_loss([v.float() for v in q], [v.float() for v in k])[0]


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"temperature: .* found -1"):
        mocov3_loss(random_views(2), random_views(2), temperature=-1)
    with pytest.raises(ValueError, match=r"student, teacher: .* found 1 and 1"):
        mocov3_loss(random_views(1), random_views(1))
