"""Alignment and uniformity against the code in the paper's figure, and on points whose values are known."""

import math

import pytest
import torch
from torch.nn import functional as F

from varscale.evaluation import alignment_uniformity
from varscale.evaluation.alignment_uniformity import alignment, uniformity


def test_they_are_the_papers_formulas(monkeypatch):
    monkeypatch.setattr(alignment_uniformity, "ROWS", 7)
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(40, 8, dtype=torch.float64)) for _ in range(2))
    # Wang & Isola, arXiv 2005.10242, figure 5
    assert alignment(x, y, 2) == pytest.approx((x - y).norm(p=2, dim=1).pow(2).mean().item())
    assert alignment(x, y, 1) == pytest.approx((x - y).norm(p=2, dim=1).mean().item())
    assert uniformity(x, 2) == pytest.approx(torch.pdist(x, p=2).pow(2).mul(-2).exp().mean().log().item())
    assert uniformity(x, 0.5) == pytest.approx(torch.pdist(x, p=2).pow(2).mul(-0.5).exp().mean().log().item())


def test_extremes():
    same = torch.ones(5, 1)
    assert alignment(same, same, 2) == 0
    assert uniformity(same, 2) == pytest.approx(0)
    assert uniformity(torch.tensor([[1.0], [-1.0]]), 2) == pytest.approx(-8)
    assert math.isnan(uniformity(same[:1], 2))
