"""Means and intervals against SciPy and by hand."""

from __future__ import annotations

import pytest
from scipy import stats

from stablemoe_ds.comparison.statistics import paired_difference, spread


def test_spread_by_hand():
    found = spread([1.0, 2.0, 6.0])
    assert (found.mean, found.count) == (3.0, 3)
    assert found.deviation == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    assert spread([4.0]).deviation is None


@pytest.mark.parametrize("pairs", [2, 3, 7, 60])
def test_interval_is_that_of_a_paired_t_test(pairs: int):
    ours = {seed: 30.0 + seed * 1.5 + seed**2 % 3 for seed in range(pairs)}
    reference = {seed: 29.0 + seed * 1.4 for seed in range(pairs)}
    found = paired_difference(ours, reference)
    low, high = stats.ttest_rel(list(ours.values()), list(reference.values())).confidence_interval(0.95)
    assert found is not None
    assert found.half_width is not None
    assert (found.mean, found.half_width) == pytest.approx(((low + high) / 2, (high - low) / 2), rel=1e-9)


def test_only_seeds_that_both_have_are_compared():
    found = paired_difference({1: 5.0, 2: 7.0, 3: 100.0}, {2: 6.0, 1: 5.0, 4: 0.0})
    assert found is not None
    assert found.mean == 0.5


def test_one_pair_has_no_interval_and_none_no_difference():
    one = paired_difference({1: 5.0}, {1: 4.0, 2: 9.0})
    assert one is not None
    assert (one.mean, one.half_width) == (1.0, None)
    assert paired_difference({1: 5.0}, {2: 4.0}) is None
