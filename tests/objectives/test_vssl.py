"""VSSL equals torch's distributions and the written formulas, for any input in its domain."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from varscale.objectives.collapse import direction_moments, effective_rank, normalised, spread
from varscale.objectives.vssl import Gaussian, soft_clamp, vssl_loss

DISTANCES = pytest.mark.parametrize("distance", ["cosine", "euclidean"])


def random_views(views, num_samples, width, seed, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return (scale * torch.randn(num_samples, width, generator=generator, dtype=torch.float64)).to(dtype)

    return [Gaussian(draw(), draw()) for _ in range(views)]


def require_grad(views):
    return [Gaussian(*(tensor.clone().requires_grad_() for tensor in view)) for view in views]


def gradients(loss, views):
    return torch.autograd.grad(loss, [tensor for view in views for tensor in view], materialize_grads=True)


def normal(view, bounds=(-6.0, 2.0)):
    return Normal(view.mean, (soft_clamp(view.logvar, *bounds) / 2).exp())


def literal_cosine(student, teacher):
    """(KL, NLL) of the cosine form for one order, as written in its definition."""
    log_s, log_t = soft_clamp(student.logvar, -6, 2), soft_clamp(teacher.logvar, -6, 2)
    var_s, var_t = log_s.exp(), log_t.exp()
    apart = 1 - F.cosine_similarity(student.mean, teacher.mean, dim=1)
    kl = 0.5 * (log_t - log_s + var_s / var_t - 1).mean(1) + apart * (1 / var_t).mean(1)
    nll = 0.5 * (log_s + var_t / var_s).mean(1) + apart * (1 / var_s).mean(1)
    return kl.mean(), nll.mean()


def test_euclidean_equals_torch_distributions():
    student, teacher = random_views(2, 9, 5, seed=0), random_views(2, 9, 5, seed=1)
    loss, terms = vssl_loss(
        student, teacher, distance="euclidean", kl_weight=0.7, likelihood_weight=1.3, prior_weight=0.1
    )
    orders = [(normal(student[0]), normal(teacher[1])), (normal(student[1]), normal(teacher[0]))]
    kl = sum(kl_divergence(q, p).sum(1).mean() for q, p in orders) / 2
    # E_p[-log q] is the cross-entropy KL(p || q) + H(p).
    nll = sum((kl_divergence(p, q) + p.entropy()).sum(1).mean() for q, p in orders) / 2
    prior = sum(kl_divergence(q, Normal(0.0, 1.0)).sum(1).mean() for q, _ in orders) / 2
    for name, expected in (("kl", kl), ("nll", nll), ("prior", prior)):
        torch.testing.assert_close(terms[name], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, 0.7 * kl + 1.3 * nll + 0.1 * prior, rtol=1e-12, atol=0)


def test_cosine_equals_its_definition():
    student, teacher = random_views(2, 9, 5, seed=2), random_views(2, 9, 5, seed=3)
    loss, terms = vssl_loss(student, teacher, kl_weight=0.7, likelihood_weight=1.3, prior_weight=0.1)
    orders = [literal_cosine(student[0], teacher[1]), literal_cosine(student[1], teacher[0])]
    kl, nll = (sum(term) / 2 for term in zip(*orders, strict=True))
    prior = sum(kl_divergence(normal(view), Normal(0.0, 1.0)).mean() for view in student) / 2
    torch.testing.assert_close(terms["kl"], kl, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["nll"], nll, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, 0.7 * kl + 1.3 * nll + 0.1 * prior, rtol=1e-12, atol=0)
    assert "prior" not in vssl_loss(student, teacher)[1]


def test_in_one_dimension_cosine_is_euclidean_between_signs():
    """There the normalised means are +1 and -1, and 2 (1 - cos) is their squared distance itself."""
    student, teacher = random_views(2, 30, 1, seed=4), random_views(2, 30, 1, seed=5)
    _, cosine = vssl_loss(student, teacher)
    signs = [[Gaussian(view.mean.sign(), view.logvar) for view in views] for views in (student, teacher)]
    _, euclidean = vssl_loss(*signs, distance="euclidean")
    torch.testing.assert_close(cosine["kl"], euclidean["kl"])
    torch.testing.assert_close(cosine["nll"], euclidean["nll"] - math.log(2 * math.pi) / 2)


@DISTANCES
def test_more_views_average_over_ordered_pairs(distance):
    student, teacher = random_views(3, 7, 4, seed=6), random_views(3, 7, 4, seed=7)
    pairs = [(0, 1), (0, 2), (1, 2)]  # each call below averages both orders
    losses = [
        vssl_loss([student[a], student[b]], [teacher[a], teacher[b]], distance=distance, prior_weight=0.5)[0]
        for a, b in pairs
    ]
    torch.testing.assert_close(vssl_loss(student, teacher, distance=distance, prior_weight=0.5)[0], sum(losses) / 3)


@DISTANCES
def test_gradient(distance):
    student, teacher = random_views(2, 3, 4, seed=8, scale=2), random_views(2, 3, 4, seed=9, scale=2)

    def loss(*tensors):
        views = [Gaussian(*tensors[:2]), Gaussian(*tensors[2:])]
        return vssl_loss(views, teacher, distance=distance, prior_weight=0.3)[0]

    assert torch.autograd.gradcheck(loss, [tensor for view in require_grad(student) for tensor in view])


@DISTANCES
def test_teacher_carries_no_gradient(distance):
    student, teacher = require_grad(random_views(2, 5, 4, seed=10)), require_grad(random_views(2, 5, 4, seed=11))
    loss, terms = vssl_loss(student, teacher, distance=distance, prior_weight=0.1)
    loss.backward()
    assert all(tensor.grad is None for view in teacher for tensor in view)
    assert all(tensor.grad.abs().sum() > 0 for view in student for tensor in view)
    assert not any(term.requires_grad for term in terms.values())


@pytest.mark.parametrize("delta", [0.0, 0.3, 2.0])
def test_optimal_variance(delta):
    """KL + NLL is stationary in the student's variance at sqrt(var_t (var_t + delta^2)), never below var_t."""
    bounds, log_t = (-9.0, 9.0), torch.linspace(-2, 2, 4, dtype=torch.float64)

    def raw(logvar):  # the inverse of soft_clamp
        return logvar / (1 - (logvar / 9) ** 4) ** 0.25

    optimum = (log_t + (log_t.exp() + delta**2).log()) / 2
    assert (optimum >= log_t - 1e-15).all()
    teacher = [Gaussian(torch.zeros(1, 4).double(), raw(log_t)[None])] * 2

    def slope(shift):
        logvar = raw(optimum + shift)[None].requires_grad_()
        student = [Gaussian(torch.full((1, 4), delta, dtype=torch.float64), logvar)] * 2
        loss, _ = vssl_loss(student, teacher, distance="euclidean", logvar_bounds=bounds)
        return torch.autograd.grad(loss, logvar)[0]

    torch.testing.assert_close(slope(0.0), torch.zeros(1, 4).double(), rtol=0, atol=1e-12)
    assert (slope(-0.1) < -0.01).all()
    assert (slope(0.1) > 0.01).all()


@DISTANCES
@given(
    num_samples=st.integers(1, 8),
    width=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4]),
    logvar_scale=st.sampled_from([0.0, 1.0, 1e4, 1e30]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=100)
def test_finite_for_any_input(distance, num_samples, width, seed, scale, logvar_scale, dtype):
    views = random_views(4, num_samples, width, seed)
    views = [Gaussian((scale * mean).to(dtype), (logvar_scale * logvar).to(dtype)) for mean, logvar in views]
    student = require_grad(views[:2])
    for teacher in (views[2:], views[:2]):  # others, and the student itself
        loss, terms = vssl_loss(student, teacher, distance=distance, prior_weight=0.1)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert loss.isfinite()
        assert all(term.isfinite().all() for term in terms.values())
        assert all(gradient.isfinite().all() for gradient in gradients(loss, student))


@DISTANCES
@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_order_of_samples_dimensions_and_views_makes_no_difference(distance, seed):
    student, teacher = random_views(2, 6, 5, seed), random_views(2, 6, 5, seed + 1)
    loss, _ = vssl_loss(student, teacher, distance=distance)
    generator = torch.Generator().manual_seed(seed)
    samples, dimensions = torch.randperm(6, generator=generator), torch.randperm(5, generator=generator)
    student, teacher = (
        [Gaussian(mean[samples][:, dimensions], logvar[samples][:, dimensions]) for mean, logvar in reversed(views)]
        for views in (student, teacher)
    )
    torch.testing.assert_close(vssl_loss(student, teacher, distance=distance)[0], loss)


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 0.1, 7.0, 1e5]))
@settings(deadline=None, max_examples=20)
def test_cosine_ignores_the_length_of_means(seed, scale):
    student, teacher = random_views(2, 6, 5, seed), random_views(2, 6, 5, seed + 1)
    scaled = [Gaussian(scale * mean, logvar) for mean, logvar in student]
    torch.testing.assert_close(vssl_loss(scaled, teacher)[0], vssl_loss(student, teacher)[0])


def test_equal_gaussians_have_no_divergence():
    views = random_views(1, 6, 5, seed=12) * 2
    for distance in ("cosine", "euclidean"):
        _, terms = vssl_loss(views, views, distance=distance)
        assert abs(terms["kl"]) < 1e-14
        torch.testing.assert_close(terms["cosine"].item(), 1.0)


def test_terms_tell_health_from_collapse():
    student = random_views(2, 4000, 64, seed=13)
    terms = vssl_loss(student, student)[1]
    logvar = soft_clamp(torch.stack([view.logvar for view in student]), -6, 2)
    assert spread(terms["direction"], terms["direction_square"]).item() == pytest.approx(1, rel=0.01)
    assert abs(terms["cosine"]) < 0.01
    assert [terms[f"logvar_{name}"] for name in ("mean", "min", "max")] == [logvar.mean(), logvar.min(), logvar.max()]
    # All samples alike, though the two views differ.
    collapsed = [Gaussian(view.mean[:1].expand(4000, -1), view.logvar) for view in student]
    terms = vssl_loss(collapsed, collapsed)[1]
    assert spread(terms["direction"], terms["direction_square"]) < 1e-7
    # So are zeros, which have no direction at all.
    zeros = [Gaussian(torch.zeros_like(view.mean), view.logvar) for view in student]
    terms = vssl_loss(zeros, zeros)[1]
    assert spread(terms["direction"], terms["direction_square"]) == 0


def test_the_effective_rank_is_the_entropy_of_the_spectrum_within_views():
    generator = torch.Generator().manual_seed(3)
    views = [torch.randn(40, 6, generator=generator) * torch.arange(1, 7) + 5 * view for view in (0, 1)]
    centred = torch.cat([normalised(view) - normalised(view).mean(dim=0) for view in views]).double()
    variances = torch.linalg.svdvals(centred) ** 2
    shares = variances / variances.sum()
    expected = torch.exp(-(shares * shares.log()).sum()).item()
    moments = direction_moments(views)
    assert effective_rank(moments["direction"], moments["direction_product"]).item() == pytest.approx(
        expected, rel=1e-4
    )
    assert 1.5 < expected < 6


@pytest.mark.parametrize(("dimensions", "rank"), [(0, 0), (1, 1), (3, 3)])
def test_the_effective_rank_counts_the_dimensions_that_are_left(dimensions, rank):
    """The spread does not see it: it is 1 here for one dimension as for three."""
    corners = torch.tensor(list(product([-1.0, 1.0], repeat=dimensions or 2)))
    latents = torch.zeros(len(corners), 8)
    latents[:, :dimensions] = corners[:, :dimensions]
    latents[:, 7] = not dimensions
    moments = direction_moments([latents, latents])
    assert effective_rank(moments["direction"], moments["direction_product"]).item() == pytest.approx(rank, abs=1e-5)
    found = spread(moments["direction"], moments["direction_square"]).item()
    assert found == pytest.approx(1.0 if dimensions else 0.0, abs=1e-6)


def test_the_spread_is_the_deviation_of_the_normalised_mean_and_averages_over_parts():
    views = random_views(2, 12, 5, seed=16)
    normalised = torch.stack([F.normalize(view.mean) for view in views])
    expected = (5 * normalised.var(dim=1, correction=0).mean()).sqrt()
    parts = [[Gaussian(*(tensor[part] for tensor in view)) for view in views] for part in torch.arange(12).chunk(3)]
    terms = [vssl_loss(part, part)[1] for part in parts]
    means = [torch.stack([term[name] for term in terms]).mean(0) for name in ("direction", "direction_square")]
    torch.testing.assert_close(spread(*means), expected)


def test_low_precision_and_autocast_are_computed_in_float32():
    student, teacher = (random_views(2, 6, 5, seed, torch.bfloat16) for seed in (14, 15))
    upcast = [[Gaussian(mean.float(), logvar.float()) for mean, logvar in views] for views in (student, teacher)]
    expected = vssl_loss(*upcast)[0]
    assert vssl_loss(student, teacher)[0] == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert vssl_loss(*upcast)[0] == expected


def test_plain_pairs_will_do():
    student, teacher = random_views(2, 6, 5, seed=16), random_views(2, 6, 5, seed=17)
    assert (
        vssl_loss([tuple(view) for view in student], [tuple(view) for view in teacher])[0]
        == (vssl_loss(student, teacher)[0])
    )


def test_soft_clamp_stays_inside_and_rises_with_its_gradient():
    values = torch.tensor([-math.inf, -1e30, -1e4, -60, -7, -6, -4, -2, 0, 1, 2, 3, 60, 1e4, 1e30, math.inf])
    clamped = soft_clamp(values, -6, 2)
    assert clamped.min() == -6
    assert clamped.max() == 2
    assert (clamped.diff() >= 0).all()
    finite = values[2:-2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(soft_clamp(finite, -6, 2).sum(), finite)
    slope = (1 + ((finite.detach().double() + 2) / 4) ** 4) ** -1.25
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=0)
    assert (gradient > 0).all()


def test_soft_clamp_is_near_the_identity_inside():
    inside = torch.linspace(-4, 0, 101, dtype=torch.float64)
    assert (soft_clamp(inside, -6, 2) - inside).abs().max() < 0.031
    around_bound = torch.tensor([-6.1, -6, -5.9, 1.9, 2, 2.1, 30], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: soft_clamp(values, -6, 2), around_bound)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance": "manhattan"}, "distance: expected one of cosine, euclidean, found 'manhattan'"),
        ({"kl_weight": -1.0}, "kl_weight: .* found -1.0"),
        ({"prior_weight": math.nan}, "prior_weight: .* found nan"),
        ({"logvar_bounds": (2.0, 2.0)}, r"logvar_bounds: .* found \(2.0, 2.0\)"),
        ({"student": random_views(1, 6, 5, 0)}, "student, teacher: .* found 1 and 2"),
        ({"teacher": random_views(3, 6, 5, 0)}, "student, teacher: .* found 2 and 3"),
        ({"teacher": random_views(2, 6, 4, 0)}, r"teacher\[0\].mean: .* \(6, 5\) .* found .* \(6, 4\)"),
        ({"student": random_views(2, 0, 5, 0)}, r"student\[0\].mean: expected a non-empty"),
        ({"student": [Gaussian(torch.ones(6, 5), torch.ones(6, 1))] * 2}, r"student\[0\].logvar: .* \(6, 1\)"),
        ({"student": [Gaussian(torch.ones(6, 5), torch.ones(6, 5).int())] * 2}, r"student\[0\].logvar: .* torch.int32"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"student": random_views(2, 6, 5, 0), "teacher": random_views(2, 6, 5, 1)}
    vssl_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        vssl_loss(**(arguments | change))
