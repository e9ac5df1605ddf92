"""Means over seeds, and differences paired over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STUDENT_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
"""97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; a library for thirty numbers would be a heavy one."""


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
    # More than 31 pairs get the interval of 31, which is a little too wide.
    quantile = STUDENT_975[min(found.count - 1, len(STUDENT_975)) - 1]
    return Difference(found.mean, quantile * found.deviation / math.sqrt(found.count))
