"""Places of experts by load, against trying every way to spread them."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from stablemoe_ds.tables.expert_places import order_by_load, rank_loads


@pytest.mark.parametrize("seed", range(5))
def test_busiest_rank_is_close_to_the_best_of_all_ways(seed: int) -> None:
    load_N = np.random.default_rng(seed).gamma(1.0, size=6)
    order_LN = order_by_load([load_N], ranks=3)
    best = min(max(load_N[list(p)].reshape(3, 2).sum(1)) for p in permutations(range(6)))
    assert sorted(order_LN[0]) == list(range(6))
    assert load_N[order_LN[0]].reshape(3, 2).sum(1).max() <= 4 / 3 * best


def test_layers_are_placed_apart_and_experts_of_a_rank_stand_by_number() -> None:
    order_LN = order_by_load([[8, 7, 1, 2], [1, 1, 1, 1], [0, 0, 9, 1]], ranks=2)
    assert order_LN.tolist() == [[0, 2, 1, 3], [0, 2, 1, 3], [1, 2, 0, 3]]


def test_loads_of_ranks_follow_the_places() -> None:
    loads = rank_loads([[8, 7, 1, 2]], [[0, 2, 1, 3]], ranks=2)
    assert loads.tolist() == [[1.0, 1.0]]
    assert rank_loads([[8, 7, 1, 2]], [range(4)], ranks=2)[0] == pytest.approx([15 / 9, 3 / 9])
