"""Intervals are scipy's."""

import math

import numpy as np
import pytest
from scipy import stats

from varscale.intervals import estimate


def test_the_interval_is_students():
    values = [61.0, 64.0, 62.5, 70.0]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert math.isnan(estimate([3.0]).half_width)
