"""Turns of experts: played through on a small table of places, for every expert held and needed."""

from __future__ import annotations

import random

import pytest

from stablemoe_ds.moe.turns import turns

EXPERTS = 7


@pytest.mark.parametrize("seed", range(60))
def test_every_expert_has_one_turn_and_is_there_when_it_comes(seed):
    draw = random.Random(seed)
    places, filled = draw.randint(1, EXPERTS), draw.random()
    held = [expert if draw.random() < filled else None for expert in draw.sample(range(EXPERTS), places)]
    needed, worth = set(draw.sample(range(EXPERTS), draw.randint(0, EXPERTS))), [draw.random() for _ in range(EXPERTS)]
    there, first_seen = list(held), {}
    for number, turn in enumerate(turns(held, needed, worth)):
        if turn.fetched:
            # What stands there has had its turn, or has none in this call.
            assert there[turn.place] not in needed - first_seen.keys()
            there[turn.place] = turn.expert
        assert there[turn.place] == turn.expert
        assert turn.expert not in first_seen
        first_seen[turn.expert] = number
    assert first_seen.keys() == needed
    gone = {expert for expert in held if expert is not None} - set(there)
    stayed = set(there) & {expert for expert in held if expert is not None}
    assert not any(worth[a] > worth[b] for a in gone - needed for b in stayed - needed), "the least worthy give way"
    if len(needed) <= places:
        assert needed <= set(there)


def test_a_long_prompt_leaves_those_of_most_worth_where_they_are():
    worth = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    order = turns([0, 1, 2, 3], set(range(10)), worth)
    assert {turn.place for turn in order if turn.fetched} == {2, 3}
    assert [turn.expert for turn in order if not turn.fetched] == [3, 2, 1, 0], "those that give way serve first"
    assert [turn.expert for turn in order if turn.fetched] == [9, 8, 7, 6, 5, 4], "those of most worth come to stay"
