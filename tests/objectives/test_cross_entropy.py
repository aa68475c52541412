"""Cross-entropy equals the written sum with smoothed targets, whatever the precision of the logits."""

import pytest
import torch

from varscale.objectives.cross_entropy import cross_entropy_loss


def random_logits(samples=7, classes=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(0, classes, (samples,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_it_equals_the_written_sum(smoothing):
    logits, labels = random_logits()
    loss, terms = cross_entropy_loss(logits, labels, label_smoothing=smoothing)
    targets = torch.full((7, 4), smoothing / 4, dtype=torch.float64)
    targets[torch.arange(7), labels] += 1 - smoothing
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    (ours,), (theirs,) = (torch.autograd.grad(value, logits, retain_graph=True) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert terms["top1"].item() == pytest.approx(100 * (logits.argmax(1) == labels).sum().item() / 7)


def test_half_precision_and_large_logits_are_finite():
    logits, labels = random_logits(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = cross_entropy_loss(logits * 1e4, labels, label_smoothing=0.1)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing: .* found 1.0"),
        ({"labels": torch.tensor([0, 4])}, "labels: expected classes from 0 to 3"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels: expected an integer tensor"),
        ({"logits": torch.zeros(4)}, r"\(N, D\) floating-point tensor, found .* shape \(4,\)"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"logits": torch.zeros(2, 4), "labels": torch.tensor([0, 3])}
    cross_entropy_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        cross_entropy_loss(**(arguments | change))
