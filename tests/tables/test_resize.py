"""A table on more or fewer experts: who stays together, how even it is, and how cohesive next to one built at once."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest

from stablemoe_ds.config.table_options import VectorOptions
from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.builders import build_table
from stablemoe_ds.tables.counted_corpus import Corpus
from stablemoe_ds.tables.measures import measure, moved
from stablemoe_ds.tables.resize import resized_table
from stablemoe_ds.tables.table import RoutingTable
from stablemoe_ds.tables.vectors import id_vectors
from tests.tables.texts import KINDS, text_of_kinds

TEXT = text_of_kinds()
SEEN = np.flatnonzero(TEXT.token_counts)
NAMES = np.array([5, 2, 7, 0, 3, 6, 1, 4], np.int32)
"""Experts have no order: halves of one kind do not have neighbouring numbers."""


def of_kinds(parts: int, names: np.ndarray = NAMES) -> RoutingTable:
    """Each kind's ids on ``parts`` experts of its own, 4 kinds."""
    ids = np.arange(TEXT.vocab_size)
    expert = names[ids % KINDS + KINDS * (ids // KINDS % parts)]
    return RoutingTable(expert.astype(np.int32).reshape(1, -1, 1), KINDS * parts, (2,), "tokenizer")


@cache
def built(experts: int, top_k: int = 1, choice: str = "balanced") -> RoutingTable:
    """choice ``nearest``: without a limit, so that what is made of it has a load to put right."""
    options = {"dims": 8, "choice": choice}
    return build_table("cooccurrence", options, TEXT, experts=experts, top_k=top_k, blocks=(2, 5), seed=0)


def test_experts_of_alike_ids_are_merged_whatever_their_numbers() -> None:
    merged = resized_table(of_kinds(2), TEXT, KINDS)
    kind = (SEEN % KINDS).astype(np.int32)[:, None]
    assert moved(kind, merged.expert_LVK[0, SEEN], np.ones(len(SEEN))) == 0
    assert (merged.experts, merged.blocks, merged.tokenizer) == (KINDS, (2,), "tokenizer")


def test_those_are_merged_that_lose_least() -> None:
    """Against every choice of a pair: 8 experts become 7 by the one merger that keeps ids nearest to their centroid."""
    table = built(8)
    vectors, weights = id_vectors(TEXT.followers(), VectorOptions(), 0), np.sqrt(TEXT.token_counts)
    old = table.expert_LVK[0, :, 0]
    sums = np.array([(weights[old == e, None] * vectors[old == e]).sum(0) for e in range(8)])
    load = np.array([TEXT.token_counts[old == e].sum() for e in range(8)]) * 7 / TEXT.token_counts.sum()
    length = np.linalg.norm
    lost = {
        pair: length(sums[pair[0]]) + length(sums[pair[1]]) - length(sums[pair[0]] + sums[pair[1]])
        for pair in combinations(range(8), 2)
        if load[list(pair)].sum() <= 3
    }
    new = resized_table(table, TEXT, 7, max_load=3).expert_LVK[0, :, 0]
    together = {tuple(sorted(set(old[SEEN][new[SEEN] == e].tolist()))) for e in range(7)}
    assert [group for group in together if len(group) > 1] == [min(lost, key=lambda pair: lost[pair])]


@pytest.mark.parametrize("experts", [5, 8, 11])
def test_an_expert_is_divided_and_nothing_else_moves(experts: int) -> None:
    """Where the limit allows: every new expert has the ids of one old one. Any number of experts will do."""
    table = of_kinds(1, np.arange(4))
    new = resized_table(table, TEXT, experts, max_load=4).expert_LVK[0, :, 0]
    assert set(new.tolist()) == set(range(experts))
    for expert in range(experts):
        assert len(set(table.expert_LVK[0, new == expert, 0].tolist())) == 1
    absent = new[TEXT.token_counts == 0]
    assert len(set(absent.tolist())) > experts // 2, "ids that do not occur are dealt out"


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("after", [4, 6, 16])
def test_resized_is_nearly_as_good_as_built_at_once(after: int, top_k: int) -> None:
    """Load under the limit, different experts for an id, and most of the cohesion of a table that was built so."""
    source = built(8, top_k, "nearest")
    assert max(layer.max_load for layer in measure(source, TEXT)) > 1.3
    resized = resized_table(source, TEXT, after)
    assert (np.diff(np.sort(resized.expert_LVK, axis=-1), axis=-1) > 0).all()
    for mine, fresh in zip(measure(resized, TEXT), measure(built(after, top_k), TEXT), strict=True):
        assert mine.max_load <= max(1.3, mine.least_load) * 1.001
        assert mine.cohesion - mine.cohesion_random >= 0.75 * (fresh.cohesion - fresh.cohesion_random)


def test_it_says_how_it_was_made_and_is_the_same_again() -> None:
    table = built(8)
    one, same = (resized_table(table, TEXT, 12, seed=3) for _ in range(2))
    assert one.sha256 == same.sha256
    made = {name: value for name, value in one.made.items() if name != "version"}
    origin = {"sha256": table.sha256, "made": dict(table.made)}
    assert made == {
        "builder": "resized",
        "options": {"max_load": 1.3},
        "experts": 12,
        "seed": 3,
        "corpus": "text",
        "table": origin,
    }


@pytest.mark.parametrize("experts", [-1, 0, 1])
def test_fewer_experts_than_an_id_has_are_refused(experts: int) -> None:
    with pytest.raises(UserError, match=rf"--experts: got {experts}: expected at least 2, as many as the table gives"):
        resized_table(built(4, top_k=2), TEXT, experts)


def test_a_text_of_other_ids_is_refused() -> None:
    with pytest.raises(UserError, match="has 200 ids, the corpus has 5"):
        resized_table(built(4), Corpus(np.ones(5, np.int64)), 8)
