"""Means over seeds, and differences paired over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit


@dataclass(frozen=True)
class Spread:
    """Of a sample. deviation: with n - 1 in the denominator; None for a single value."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and half the width of its 95 % confidence interval; None for a single pair."""

    mean: float
    half_width: float | None


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(ours: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Ours minus the reference over the seeds that both have; None if there is none.

    Pairing takes out what a seed does to both alike: the data order and the start of what they share.
    """
    found = spread([ours[seed] - reference[seed] for seed in sorted(ours.keys() & reference.keys())] or [math.nan])
    if math.isnan(found.mean):
        return None
    if found.deviation is None:
        return Difference(found.mean, None)
    quantile = float(stdtrit(found.count - 1, 0.975))  # of Student's t
    return Difference(found.mean, quantile * found.deviation / math.sqrt(found.count))
