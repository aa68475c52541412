"""VarCon equals the authors' values and a literal transcription of the formulas, for any input in its domain."""

import operator
from functools import reduce

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor

from varscale.objectives.blocks import LOGITS_PER_BLOCK
from varscale.objectives.centroids import local_statistics
from varscale.objectives.varcon import varcon_loss, varcon_loss_from_statistics


def random_batch(num_samples, width, num_classes, seed, dtype=torch.float64):
    """Unit embeddings, a third of them from a coarse grid so that equal, orthogonal and opposite ones occur."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_samples, width, generator=generator, dtype=torch.float64)
    grid = torch.randint(-1, 2, z.shape, generator=generator).to(z)
    grid[:, 0] += (grid.square().sum(1) == 0).to(z)
    z = torch.where(torch.rand(num_samples, 1, generator=generator) < 1 / 3, grid, z)
    labels = torch.randint(0, num_classes, (num_samples,), generator=generator)
    return F.normalize(z).to(dtype), labels


def literal_varcon(z, labels, temperature, epsilon, detach_target=False, detach_centroids=True):
    """Eqs. 7-13 as printed: softmax, one-hot indicator and an explicit target distribution."""
    classes = labels.unique()
    onehot = (labels[:, None] == classes).to(z)
    means = (onehot / onehot.sum(0)).T @ (z.detach() if detach_centroids else z)
    norms = means.norm(dim=1, keepdim=True)
    w = torch.where(norms > 1e-14, means / norms.clamp(min=1e-14), 0)
    p = torch.softmax(z @ w.T / temperature, dim=1)
    confidence = (p * onehot).sum(1)
    tau2 = (temperature - epsilon) + 2 * epsilon * confidence
    weight = 1 + (torch.exp(1 / (tau2.detach() if detach_target else tau2)) - 1)[:, None] * onehot
    q = weight / weight.sum(1, keepdim=True)
    kl = (q * (q.log() - p.log())).sum(1).mean()
    nll = -confidence.log().mean()
    return kl + nll, {"kl": kl, "nll": nll, "tau2": tau2, "confidence": confidence}


def loss_and_gradient(function, z, *args, **kwargs):
    z = z.clone().requires_grad_()
    loss, terms = function(z, *args, **kwargs)
    loss.backward()
    return loss.detach(), terms, z.grad


batches = {
    "num_samples": st.integers(1, 24),
    "width": st.integers(1, 8),
    "num_classes": st.integers(1, 7),
    "seed": st.integers(0, 2**31),
}
temperatures = st.sampled_from([0.005, 0.02, 0.1, 0.5, 10.0])
fractions = st.sampled_from([0.0, 0.2, 0.999])  # of the temperature, for epsilon


@pytest.mark.parametrize("case", range(9))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_authors_values(shared, case, dtype, tolerance):
    golden = np.load(shared / "golden" / "varcon_float64.npz")
    value = {key: torch.from_numpy(golden[f"case{case}.{key}"]) for key in ("z", "y", "tau2", "grad")}
    number = {key: golden[f"case{case}.{key}"].item() for key in ("loss", "kl", "nll", "confidence")}
    loss, terms, gradient = loss_and_gradient(
        varcon_loss,
        value["z"].to(dtype),
        value["y"],
        golden[f"case{case}.num_classes"].item(),
        temperature=golden[f"case{case}.tau1"].item(),
        epsilon=golden[f"case{case}.epsilon"].item(),
    )
    assert loss.item() == pytest.approx(number["loss"], abs=tolerance)
    assert terms["kl"].item() == pytest.approx(number["kl"], abs=tolerance)
    assert terms["nll"].item() == pytest.approx(number["nll"], abs=tolerance)
    assert terms["confidence"].mean().item() == pytest.approx(number["confidence"], abs=tolerance)
    torch.testing.assert_close(terms["tau2"].double(), value["tau2"], rtol=0, atol=tolerance)
    torch.testing.assert_close(gradient.double(), value["grad"], rtol=0, atol=tolerance)
    assert terms["classes_present"] == len(value["y"].unique())


@given(**batches, temperature=temperatures, fraction=fractions, detach_target=st.booleans())
@settings(deadline=None, max_examples=150)
def test_literal_transcription(num_samples, width, num_classes, seed, temperature, fraction, detach_target):
    z, labels = random_batch(num_samples, width, num_classes, seed)
    temperature = max(temperature, 0.01 / (1 - fraction))  # the transcription overflows in exp(1 / tau2) below
    options = {"temperature": temperature, "epsilon": fraction * temperature, "detach_target": detach_target}
    loss, terms, gradient = loss_and_gradient(varcon_loss, z, labels, num_classes, **options)
    expected, expected_terms, expected_gradient = loss_and_gradient(literal_varcon, z, labels, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-11)
    for name, value in expected_terms.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_classes", [9, 1_000_000])
@pytest.mark.parametrize("detach_target", [False, True])
def test_gradient_through_centroids(num_classes, detach_target):
    generator = torch.Generator().manual_seed(3)
    z = F.normalize(torch.randn(40, 6, generator=generator, dtype=torch.float64))
    labels = torch.randint(0, 9, (40,), generator=generator)
    options = {"detach_target": detach_target, "detach_centroids": False}
    loss, _, gradient = loss_and_gradient(varcon_loss, z, labels, num_classes, **options)
    expected, _, expected_gradient = loss_and_gradient(literal_varcon, z, labels, 0.1, 0.02, **options)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda z: varcon_loss(z, labels, num_classes, detach_centroids=False, temperature=0.5)[0], z.requires_grad_()
    )


def test_blocks_of_logits_make_no_difference(monkeypatch):
    z, labels = random_batch(50, 5, 6, seed=1)
    whole = loss_and_gradient(varcon_loss, z, labels, 6, detach_centroids=False)
    monkeypatch.setattr("varscale.objectives.blocks.LOGITS_PER_BLOCK", 6 * 7)  # 7 rows, a short last block
    blocks = loss_and_gradient(varcon_loss, z, labels, 6, detach_centroids=False)
    torch.testing.assert_close(blocks[0], whole[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(blocks[2], whole[2], rtol=0, atol=1e-14)


@given(**batches)
@settings(deadline=None, max_examples=50)
def test_order_of_samples_and_names_of_classes_make_no_difference(num_samples, width, num_classes, seed):
    z, labels = random_batch(num_samples, width, num_classes, seed)
    loss, terms, gradient = loss_and_gradient(varcon_loss, z, labels, num_classes)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_samples, generator=generator)
    names = torch.randperm(num_classes + 5, generator=generator)  # more classes than before: five more are absent
    permuted, permuted_terms, permuted_gradient = loss_and_gradient(
        varcon_loss, z[order], names[labels[order]], num_classes + 5
    )
    torch.testing.assert_close(permuted, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(permuted_gradient, gradient[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(permuted_terms["tau2"], terms["tau2"][order], rtol=0, atol=1e-12)
    assert permuted_terms["classes_present"] == terms["classes_present"]


@given(**batches)
@settings(deadline=None, max_examples=50)
def test_a_million_classes_give_the_answer_of_those_present(num_samples, width, num_classes, seed):
    z, labels = random_batch(num_samples, width, num_classes, seed)
    names = torch.randperm(1_000_000, generator=torch.Generator().manual_seed(seed))[:num_classes]
    dense, dense_terms, dense_gradient = loss_and_gradient(varcon_loss, z, labels, num_classes)
    sparse, sparse_terms, sparse_gradient = loss_and_gradient(varcon_loss, z, names[labels], 1_000_000)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(sparse_gradient, dense_gradient, rtol=0, atol=1e-12)
    assert sparse_terms["classes_present"] == dense_terms["classes_present"]


@given(
    **batches,
    temperature=st.sampled_from([1e-30, 1e-4, 0.005, 0.1, 10.0, 1e6]),
    fraction=fractions,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    detach_centroids=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_finite_for_any_input(num_samples, width, num_classes, seed, temperature, fraction, dtype, detach_centroids):
    z, labels = random_batch(num_samples, width, num_classes, seed, dtype)
    z = z.clone().requires_grad_()
    options = {"temperature": temperature, "epsilon": fraction * temperature, "detach_centroids": detach_centroids}
    loss, terms = varcon_loss(z, labels, num_classes, **options)
    (gradient,) = torch.autograd.grad(loss, z, torch.tensor(min(1.0, temperature)).to(loss))  # at most about 1
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.isfinite()
    assert loss > -1e-4
    assert gradient.isfinite().all()
    assert gradient.dtype == dtype
    assert all(value.isfinite().all() and not value.requires_grad for value in terms.values())
    assert terms["tau2"].shape == terms["confidence"].shape == (num_samples,)


@pytest.mark.parametrize("num_classes", [1, 10, 1_000_000])
@pytest.mark.parametrize("epsilon", [0.0, 0.02])
def test_one_class_present_gives_zero(num_classes, epsilon):
    z, _ = random_batch(12, 5, 1, seed=0)
    loss, terms, gradient = loss_and_gradient(
        varcon_loss, z, torch.full((12,), num_classes - 1), num_classes, epsilon=epsilon
    )
    assert loss == terms["kl"] == terms["nll"] == 0
    assert torch.equal(gradient, torch.zeros_like(z))
    assert terms["classes_present"] == 1


def test_half_the_target_of_cross_entropy():
    """With q held fixed, L = 2 CE(t, p) - H(q) for t = (q + onehot) / 2: its gradient is 2 (p - t) on the logits."""
    z, labels = random_batch(30, 6, 4, seed=8)
    _, terms, gradient = loss_and_gradient(varcon_loss, z, labels, 4, detach_target=True)
    w = local_statistics(z, labels, 4).centroids()
    p, onehot = torch.softmax(z @ w.T / 0.1, 1), F.one_hot(labels, 4).to(z)
    q = torch.softmax(onehot / terms["tau2"][:, None], 1)
    torch.testing.assert_close(gradient, 2 * (p - (q + onehot) / 2) @ w / 0.1 / 30, rtol=0, atol=1e-12)


def test_micro_batches_against_the_statistics_of_the_step():
    z, labels = random_batch(48, 6, 5, seed=4)
    whole, _, gradient = loss_and_gradient(varcon_loss, z, labels, 5)
    micro_batches = list(zip(z.chunk(4), labels.chunk(4), strict=True))
    statistics = reduce(operator.add, (local_statistics(*batch, 5) for batch in micro_batches))
    parts = [loss_and_gradient(varcon_loss_from_statistics, *batch, statistics) for batch in micro_batches]
    torch.testing.assert_close(sum(loss for loss, _, _ in parts) / 4, whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.cat([part for _, _, part in parts]) / 4, gradient, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_computed_in_float32(dtype):
    z, labels = random_batch(64, 16, 8, seed=5, dtype=dtype)
    loss, _, gradient = loss_and_gradient(varcon_loss, z, labels, 8)
    expected, _, expected_gradient = loss_and_gradient(varcon_loss, z.float(), labels, 8)
    assert loss == expected
    assert torch.equal(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize("detach_centroids", [False, True])
def test_autocast_makes_no_difference(detach_centroids):
    z, labels = random_batch(64, 16, 8, seed=6, dtype=torch.float32)
    options = {"detach_centroids": detach_centroids}
    expected, _, expected_gradient = loss_and_gradient(varcon_loss, z, labels, 8, **options)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, gradient = loss_and_gradient(varcon_loss, z, labels, 8, **options)
    assert loss == expected
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("detach_centroids", [False, True])
def test_no_tensor_grows_with_classes_absent_or_holds_all_logits(detach_centroids):
    z = F.normalize(torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))).requires_grad_()
    labels = torch.arange(4096) * 244_140
    with LargestTensor() as largest:
        varcon_loss(z, labels, 1_000_000_000, detach_centroids=detach_centroids)[0].backward()
    assert 4096 * 129 <= largest.elements <= LOGITS_PER_BLOCK < 4096 * 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.zeros(6)}, r"embeddings: .* shape \(6,\)"),
        ({"embeddings": torch.zeros(0, 3)}, r"embeddings: .* shape \(0, 3\)"),
        ({"embeddings": torch.zeros(6, 3, dtype=torch.int32)}, "embeddings: .* torch.int32"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels: .* shape \(6,\).* found .* shape \(5,\)"),
        ({"labels": torch.zeros(6)}, "labels: expected an integer tensor.* torch.float32"),
        ({"labels": torch.zeros(6, dtype=torch.bool)}, "labels: expected an integer tensor.* torch.bool"),
        ({"labels": torch.zeros(6, dtype=torch.int64, device="meta")}, "labels: .* on cpu, found .* on meta"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0, 1])}, "labels: expected classes from 0 to 2"),
        ({"labels": torch.tensor([0, 1, 2, -1, 0, 1])}, "labels: expected classes from 0 to 2"),
        ({"num_classes": 0}, "num_classes: expected at least 1, found 0"),
        ({"temperature": 0.0}, "temperature: .* found 0.0"),
        ({"temperature": float("nan")}, "temperature: .* found nan"),
        ({"epsilon": 0.1}, r"epsilon: expected 0 <= epsilon < temperature \(0.1\), found 0.1"),
        ({"epsilon": -0.01}, "epsilon: .* found -0.01"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"embeddings": torch.ones(6, 3), "labels": torch.tensor([0, 1, 2, 0, 1, 2]), "num_classes": 3}
    varcon_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        varcon_loss(**(arguments | change))


@pytest.mark.parametrize("num_classes", [9, 1_000_000])
def test_statistics_that_do_not_fit(num_classes):
    statistics = local_statistics(torch.eye(4), torch.tensor([0, 2, 5, 5]), num_classes)
    for missing in (1, 8):
        with pytest.raises(ValueError, match="labels: expected only classes that have samples"):
            varcon_loss_from_statistics(torch.eye(4), torch.tensor([0, 2, 5, missing]), statistics)
    with pytest.raises(ValueError, match=r"statistics: expected sums of shape \(K, 3\)"):
        varcon_loss_from_statistics(torch.ones(1, 3), torch.tensor([0]), statistics)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_any_integer_labels(dtype):
    z, labels = random_batch(20, 4, 5, seed=2)
    assert varcon_loss(z, labels.to(dtype), 5)[0] == varcon_loss(z, labels, 5)[0]
