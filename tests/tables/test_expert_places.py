"""Places of experts by load, against trying every way to spread them."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from stablemoe_ds.tables.expert_places import NO_EXPERT, ExpertPlaces


@pytest.mark.parametrize("seed", range(5))
def test_busiest_rank_is_close_to_the_best_of_all_ways(seed: int) -> None:
    load_N = np.random.default_rng(seed).gamma(1.0, size=6)
    (order_N,) = ExpertPlaces.by_load([load_N], ranks=3).expert_LY
    best = min(max(load_N[list(p)].reshape(3, 2).sum(1)) for p in permutations(range(6)))
    assert sorted(order_N) == list(range(6))
    assert load_N[order_N].reshape(3, 2).sum(1).max() <= 4 / 3 * best


def test_layers_are_placed_apart_and_experts_of_a_rank_stand_by_number() -> None:
    places = ExpertPlaces.by_load([[8, 7, 1, 2], [1, 1, 1, 1], [0, 0, 9, 1]], ranks=2)
    assert places.expert_LY.tolist() == [[0, 2, 1, 3], [0, 2, 1, 3], [1, 2, 0, 3]]


def test_the_heaviest_are_on_every_rank_and_the_others_on_one() -> None:
    places = ExpertPlaces.by_load([[1, 9, 2, 8, 3, 4]], ranks=3, replicated=2)
    assert places.of_each_rank == 4
    assert [places.held_by(rank, 0) for rank in range(3)] == [[5, NO_EXPERT, 1, 3], [4, NO_EXPERT, 1, 3], [0, 2, 1, 3]]


@pytest.mark.parametrize(("experts", "ranks", "replicated"), [(6, 3, 0), (6, 3, 1), (6, 3, 5), (4, 4, 1), (5, 1, 2)])
def test_each_rank_sends_an_expert_s_tokens_to_itself_or_to_the_one_that_has_it(
    experts: int, ranks: int, replicated: int
) -> None:
    load_LN = np.random.default_rng(1).gamma(1.0, size=(2, experts))
    places = ExpertPlaces.by_load(load_LN, ranks, replicated)
    each = places.of_each_rank
    for rank in range(ranks):
        to_LN, from_LY = places.places_for(rank), places.experts_for(rank)
        for layer in range(2):
            held = [places.held_by(r, layer) for r in range(ranks)]
            assert {expert for own in held for expert in own} - {NO_EXPERT} == set(range(experts))
            for expert, place in enumerate(to_LN[layer]):
                having = [r for r in range(ranks) if expert in held[r]]
                there, at = divmod(int(place), each)
                assert there in having
                assert there == rank or len(having) == 1
                assert held[there][at] == expert == from_LY[layer, place]
            assert (from_LY[layer] >= 0).sum() == experts


def test_loads_of_ranks_follow_the_places() -> None:
    by_number = ExpertPlaces.by_number(1, 4, ranks=2)
    assert ExpertPlaces.by_load([[8, 7, 1, 2]], ranks=2).rank_loads([[8, 7, 1, 2]]).tolist() == [[1.0, 1.0]]
    assert by_number.rank_loads([[8, 7, 1, 2]])[0] == pytest.approx([15 / 9, 3 / 9])
    replicated = ExpertPlaces.by_load([[9, 4, 1]], ranks=2, replicated=1)
    assert replicated.rank_loads([[9, 4, 1]])[0] == pytest.approx([8.5 / 7, 5.5 / 7]), "half of 9, and 4 or 1"
