"""A mean, and how sure it is."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean, and half the width of its 95 % interval; not a number where there is one value only."""

    mean: float
    half_width: float


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of `values`, taken as independent draws, and half its 95 % interval by Student's t."""
    from scipy.stats import t

    if len(values) == 1:
        return Estimate(values[0], math.nan)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), float(t.ppf(0.975, len(values) - 1)) * error)
