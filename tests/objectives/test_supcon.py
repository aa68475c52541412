"""SupCon and NT-Xent equal independent implementations and the written sum, in bounded memory, for any batch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from pytorch_metric_learning import losses

from varscale.objectives.blocks import LOGITS_PER_BLOCK
from varscale.objectives.supcon import supcon_loss


def random_batch(samples, width, classes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(samples, width, generator=generator, dtype=torch.float64)).to(dtype)
    return z.requires_grad_(), torch.randint(0, classes, (samples,), generator=generator)


def literal(z, labels, temperature):
    """Equation 2, sample by sample; the mean counts samples without positives as 0."""
    total = 0.0
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        logits = {a: z[i] @ z[a] / temperature for a in others}
        for p in positives:
            total = total - (logits[p] - torch.logsumexp(torch.stack(list(logits.values())), 0)) / len(positives)
    return total / len(z)


def assert_equal_with_gradient(found, expected, z, atol):
    """z: what both are functions of."""
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    ours, theirs = (torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_supcon_equals_pytorch_metric_learning(temperature):
    x, labels = random_batch(40, 16, 5)
    assert labels.bincount().min() > 1
    z = F.normalize(2 * x)  # theirs does so itself, so that only gradients before it can be compared
    theirs = losses.SupConLoss(temperature=temperature)(z, labels)
    assert_equal_with_gradient(supcon_loss(z, labels, temperature=temperature)[0], theirs, x, 1e-10)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_pytorch_metric_learning(temperature):
    x, _ = random_batch(40, 16, 5)
    z, images = F.normalize(2 * x), torch.arange(20).repeat(2)
    theirs = losses.NTXentLoss(temperature=temperature)(z, images)
    assert_equal_with_gradient(supcon_loss(z, images, temperature=temperature)[0], theirs, x, 1e-10)


def test_nt_xent_equals_lightly():
    lightly = pytest.importorskip(
        "lightly.loss", reason="uv pip install --no-deps lightly==1.6.0, as tools/test.sh does"
    )
    x, _ = random_batch(40, 16, 5)
    z = F.normalize(2 * x)
    theirs = lightly.NTXentLoss(temperature=0.2)(*z.chunk(2))
    assert_equal_with_gradient(supcon_loss(z, torch.arange(20).repeat(2), temperature=0.2)[0], theirs, x, 1e-10)


def test_three_views_of_every_image_are_positives_of_each_other():
    z, _ = random_batch(12, 6, 5)
    images = torch.arange(4).repeat(3)
    assert_equal_with_gradient(supcon_loss(z, images, temperature=0.3)[0], literal(z, images, 0.3), z, 1e-12)


def test_samples_without_positives_contribute_nothing_and_count():
    z, _ = random_batch(7, 4, 5)
    labels = torch.tensor([0, 1, 0, 2, 3, 1, 1])
    assert_equal_with_gradient(supcon_loss(z, labels)[0], literal(z, labels, 0.1), z, 1e-12)


def test_the_cosine_of_all_pairs():
    z, labels = random_batch(7, 4, 5)
    _, terms = supcon_loss(z, labels)
    assert terms["cosine_all"].item() == pytest.approx(((z @ z.T).sum() - 7).item() / 42)


def test_the_cosine_of_positives_is_their_mean():
    z, _ = random_batch(8, 4, 5)
    _, terms = supcon_loss(z, torch.arange(4).repeat(2))
    assert terms["cosine"].item() == pytest.approx((z[:4] * z[4:]).sum(1).mean().item())
    collapsed = F.normalize(torch.ones(8, 4))
    _, terms = supcon_loss(collapsed, torch.arange(4).repeat(2))
    assert terms["cosine_all"].item() == pytest.approx(1.0)


def test_gradient():
    z, labels = random_batch(9, 4, 4)
    assert torch.autograd.gradcheck(lambda z: supcon_loss(z, labels, temperature=0.3)[0], z)


def test_blocks_of_logits_make_no_difference(monkeypatch):
    z, labels = random_batch(40, 6, 4)
    whole, _ = supcon_loss(z, labels)
    expected = torch.autograd.grad(whole, z)[0]
    monkeypatch.setattr("varscale.objectives.blocks.LOGITS_PER_BLOCK", 40 * 7)  # 7 rows, a short last block
    blocks, _ = supcon_loss(z, labels)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(blocks, z)[0], expected, rtol=0, atol=1e-14)


def test_no_tensor_holds_all_logits():
    z = F.normalize(torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))).requires_grad_()
    with LargestTensor() as largest:
        supcon_loss(z, torch.arange(4096) % 2048)[0].backward()
    assert 4096 * 128 <= largest.elements <= LOGITS_PER_BLOCK < 4096 * 4096


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.floats(1e-3, 10), st.integers(0, 1000), st.booleans())
def test_any_batch_gives_finite_loss_and_gradient(samples, classes, temperature, seed, equal):
    z, labels = random_batch(samples, 3, classes, seed, torch.float32)
    if equal:
        z = torch.ones_like(z).div(3**0.5).requires_grad_()
    loss, terms = supcon_loss(z, labels, temperature=temperature)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()
    assert all(term.isfinite() for term in terms.values())


@pytest.mark.parametrize("samples", [1, 2])
def test_batches_without_any_positive_teach_nothing(samples):
    z, _ = random_batch(samples, 3, 1)
    loss, terms = supcon_loss(z, torch.arange(samples))
    loss.backward()
    assert loss.item() == terms["cosine"].item() == 0
    assert z.grad.eq(0).all()


def test_half_precision_and_autocast_are_computed_in_float32():
    z, labels = random_batch(20, 8, 3, dtype=torch.bfloat16)
    loss, _ = supcon_loss(z, labels)
    exact, _ = supcon_loss(z.detach().float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        under, _ = supcon_loss(z.detach().float(), labels)
    assert loss.dtype == torch.float32
    assert loss == exact == under


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.zeros(6)}, r"embeddings: .* shape \(6,\)"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels: .* shape \(6,\).* found .* shape \(5,\)"),
        ({"labels": torch.zeros(6)}, "labels: expected an integer tensor.* torch.float32"),
        ({"temperature": 0.0}, "temperature: .* found 0.0"),
        ({"temperature": float("inf")}, "temperature: .* found inf"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"embeddings": torch.ones(6, 3), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    supcon_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        supcon_loss(**(arguments | change))
