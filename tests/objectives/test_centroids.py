"""Class statistics: sums, counts and centroids, the same in both forms, added and degenerate."""

import pytest
import torch
import torch.nn.functional as F

from varscale.objectives.centroids import MAX_DENSE_CLASSES, class_statistics, local_statistics

FORMS = pytest.mark.parametrize("num_classes", [12, 1_000_000], ids=["every class", "classes present"])


def batch(num_samples=40, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(num_samples, width, generator=generator, dtype=torch.float64))
    return z, torch.randint(0, 10, (num_samples,), generator=generator)


def by_class(statistics):
    """{class: (sum, count)} of the classes present."""
    ids, sums, counts = (
        statistics.class_ids[statistics.present],
        *statistics.totals[statistics.present].split([6, 1], 1),
    )
    return {int(k): (total, int(count)) for k, total, count in zip(ids, sums, counts, strict=True)}


@FORMS
def test_sums_counts_and_centroids(num_classes):
    z, labels = batch()
    statistics = class_statistics(z, labels, num_classes)
    found = by_class(statistics)
    assert sorted(found) == labels.unique().tolist()
    for k, (total, count) in found.items():
        assert count == (labels == k).sum()
        torch.testing.assert_close(total, z[labels == k].sum(0), rtol=0, atol=1e-14)
    own = statistics.centroids()[statistics.rows(labels)]
    expected = torch.stack([F.normalize(z[labels == k].mean(0), dim=0) for k in labels])
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-14)


def test_form_follows_the_number_of_classes():
    z, labels = batch()
    assert len(local_statistics(z, labels, MAX_DENSE_CLASSES).class_ids) == MAX_DENSE_CLASSES
    assert torch.equal(local_statistics(z, labels, MAX_DENSE_CLASSES + 1).class_ids, labels.unique())


@FORMS
def test_addition_equals_one_batch(num_classes):
    z, labels = batch()
    parts = [local_statistics(z[part], labels[part], num_classes) for part in (slice(0, 3), slice(3, 7), slice(7, 40))]
    added, whole = parts[0] + parts[1] + parts[2], local_statistics(z, labels, num_classes)
    assert torch.equal(added.class_ids, whole.class_ids)
    assert torch.equal(added.counts, whole.counts)
    torch.testing.assert_close(added.sums, whole.sums, rtol=0, atol=1e-14)


def test_addition_of_others_is_refused():
    z, labels = batch()
    for other in (local_statistics(z, labels, 13), local_statistics(z[:, :5], labels, 12)):
        with pytest.raises(ValueError, match="statistics: expected equal num_classes and embedding widths"):
            local_statistics(z, labels, 12) + other


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mean_of_zero_has_a_zero_centroid_and_gradient(num_classes, dtype):
    """Two antipodal pairs in every order of summation, so that rounding leaves a remainder in some."""
    a, b = F.normalize(torch.tensor([[0.3, 0.7, -0.2], [0.9, -0.1, 0.4]], dtype=dtype))
    for z in ([a, b, -a, -b], [a, -a, b, -b], [a, b, -b, -a], [b, a, -b, -a]):
        z = torch.stack([*z, a]).requires_grad_()
        centroids = local_statistics(z, torch.tensor([7, 7, 7, 7, 3]), num_classes).centroids()
        row = 7 if num_classes == 12 else 1
        assert torch.equal(centroids[row], torch.zeros(3, dtype=dtype))
        centroids.square().sum().backward()
        assert z.grad.isfinite().all()
        assert torch.equal(z.grad[:4], torch.zeros(4, 3, dtype=dtype))


def test_low_precision_is_accumulated_in_float32():
    z = torch.full((3000, 1), 1.0, dtype=torch.bfloat16)  # bfloat16 would stop counting at 256
    statistics = local_statistics(z, torch.zeros(3000, dtype=torch.int64), 2)
    assert statistics.totals.tolist() == [[3000, 3000], [0, 0]]
    assert statistics.totals.dtype == torch.float32
