"""BYOL equals lightly's cosine and the paper's squared distance; nothing reaches the teacher."""

import pytest
import torch
import torch.nn.functional as F

from varscale.objectives.byol import byol_loss
from varscale.objectives.collapse import spread


def random_views(count, samples=9, width=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(samples, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count))
    return [view.requires_grad_() for view in draw]


def test_it_equals_the_papers_squared_distance_between_unit_vectors():
    student, teacher = random_views(2), random_views(2, seed=1)
    loss, terms = byol_loss(student, teacher)
    q, z = ([F.normalize(view) for view in views] for views in (student, teacher))
    expected = (q[0] - z[1].detach()).square().sum(1).mean() + (q[1] - z[0].detach()).square().sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(value, student) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert terms["cosine"].item() == pytest.approx(1 - loss.item() / 4)


def test_it_equals_lightly():
    lightly = pytest.importorskip(
        "lightly.loss", reason="uv pip install --no-deps lightly==1.6.0, as tools/test.sh does"
    )
    student, teacher = random_views(2), random_views(2, seed=1)
    loss, _ = byol_loss(student, teacher)
    negative_cosine = lightly.NegativeCosineSimilarity()
    theirs = [negative_cosine(student[a], teacher[1 - a].detach()) for a in (0, 1)]
    expected = 4 + 2 * sum(theirs)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(value, student) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_more_views_are_twice_the_average_over_ordered_pairs():
    student, teacher = random_views(4), random_views(2, seed=1)
    pairs = [(0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
    distances = [2 - 2 * F.cosine_similarity(student[a], teacher[b]).mean() for a, b in pairs]
    torch.testing.assert_close(byol_loss(student, teacher)[0], 2 * torch.stack(distances).mean())


def test_the_teacher_carries_no_gradient():
    student, teacher = random_views(2), random_views(2, seed=1)
    loss, terms = byol_loss(student, teacher)
    loss.backward()
    assert all(view.grad is None for view in teacher)
    assert all(view.grad.abs().sum() > 0 for view in student)
    assert not any(term.requires_grad for term in terms.values())


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_collapse_is_seen_and_finite(constant):
    student = [torch.full((6, 4), constant, requires_grad=True) for _ in range(2)]
    loss, terms = byol_loss(student, [torch.full((6, 4), constant)] * 2)
    loss.backward()
    assert loss.item() == pytest.approx(0.0 if constant else 4.0, abs=1e-6)
    assert spread(terms["direction"], terms["direction_square"]).item() < 1e-3
    assert all(view.grad.isfinite().all() for view in student)


def test_half_precision_is_computed_in_float32():
    student, teacher = random_views(2, dtype=torch.bfloat16), random_views(2, seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = byol_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss == byol_loss([v.float() for v in student], [v.float() for v in teacher])[0]


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (random_views(1), random_views(1), "two or more views of both, .* found 1 and 1"),
        (random_views(2), random_views(3), "none that only the teacher sees, found 2 and 3"),
        (random_views(2), random_views(2, width=4), r"teacher\[0\]: .* student\[0\] \(9, 5\)"),
    ],
)
def test_wrong_arguments(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        byol_loss(student, teacher)
