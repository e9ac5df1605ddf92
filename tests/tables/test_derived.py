"""Tables made of a router's counts or of another table."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.balanced_choice import balanced_choice, balanced_choices
from stablemoe_ds.tables.builders import build_table
from stablemoe_ds.tables.derived import merged_table, rebalanced_table, replicated_table
from stablemoe_ds.tables.observed import explained, observed_table
from stablemoe_ds.tables.table import RoutingTable, least_load
from tests.tables.test_balanced_choice import problem
from tests.tables.texts import text_of_kinds


def served(seed: int = 0, vocab: int = 60, experts: int = 5) -> NDArray[np.int64]:
    """int64 [2, V, N], some ids never seen."""
    random = np.random.default_rng(seed)
    counts = random.poisson(random.gamma(0.3, 30, (2, vocab, experts)))
    counts[:, ::7] = 0
    return counts.astype(np.int64)


@pytest.mark.parametrize("top_k", [1, 2])
def test_each_id_goes_where_it_went_most_often(top_k: int) -> None:
    counts = served()
    table = observed_table(counts, top_k, None)
    for layer in range(2):
        for index in range(60):
            if counts[layer, index].any():
                order = sorted(range(5), key=lambda e: (-counts[layer, index, e], e))
                assert table[layer, index].tolist() == order[:top_k]
    dealt = np.bincount(table[0, ::7].reshape(-1), minlength=5)
    assert np.ptp(dealt) <= 1, "ids that were not seen are dealt out"
    kept = [
        sum(counts[layer, i, e] for i in range(60) for e in table[layer, i]) / counts[layer].sum() for layer in range(2)
    ]
    assert explained(counts, table) == pytest.approx(kept)


def test_a_table_explains_itself_wholly() -> None:
    random = np.random.default_rng(1)
    choice, tokens = random.integers(0, 5, 60), random.integers(1, 50, 60)
    counts = np.zeros((1, 60, 5), np.int64)
    counts[0, np.arange(60), choice] = tokens
    table = observed_table(counts, 1, None)
    assert np.array_equal(table[0, :, 0], choice)
    assert explained(counts, table) == [1.0]


def test_a_limit_costs_as_little_of_the_routing_as_it_can() -> None:
    counts = served(3, vocab=400)
    free, limited = observed_table(counts, 1, None), observed_table(counts, 1, 1.1)
    for layer in range(2):
        of_id = counts[layer].sum(1)
        load = np.bincount(limited[layer, :, 0], weights=of_id, minlength=5).max() * 5 / of_id.sum()
        assert load <= max(1.1, least_load(of_id, 5, 1)) + 1e-9
    assert all(0 <= a - b < 0.1 for a, b in zip(explained(counts, free), explained(counts, limited), strict=True))


def test_a_layer_that_served_nothing_is_refused() -> None:
    counts = served()
    counts[1] = 0
    with pytest.raises(UserError, match="no expert has served a token"):
        explained(counts, observed_table(counts, 1, None))


@pytest.mark.parametrize("top_k", [1, 2, 3, 6])
@pytest.mark.parametrize("max_load", [1.05, 1.5])
def test_several_choices_are_different_and_keep_the_limit(top_k: int, max_load: float) -> None:
    for seed in range(3):
        scores, counts = problem(seed, 300, 6, exponent=0.7)
        limit = max(max_load, least_load(counts, 6, top_k))
        choice = balanced_choices(scores, counts, limit, top_k)
        assert all(len(set(row)) == top_k for row in choice.tolist())
        load = np.bincount(choice.reshape(-1), weights=np.repeat(counts, top_k), minlength=6)
        assert load.max() * 6 / load.sum() <= limit * 1.001
        assert np.array_equal(balanced_choices(scores, counts, limit, 1)[:, 0], balanced_choice(scores, counts, limit))


def test_several_choices_are_the_best_ones_where_nothing_is_full() -> None:
    scores, counts = problem(0, 200, 6)
    choice = balanced_choices(scores, counts, 6.0, 3)
    assert np.array_equal(choice, np.argsort(-scores, axis=1, kind="stable")[:, :3])


TEXT = text_of_kinds()
LOPSIDED = RoutingTable(
    np.where(np.arange(TEXT.vocab_size) % 10 < 7, 0, np.arange(TEXT.vocab_size) % 4).astype(np.int32).reshape(1, -1, 1),
    4,
    (2,),
    "tokenizer",
    {"builder": "by hand"},
)


@pytest.mark.parametrize("max_load", [1.1, 2.0])
def test_rebalancing_moves_what_is_too_much_and_no_more(max_load: float) -> None:
    counts = TEXT.token_counts
    before = LOPSIDED.expert_load(counts)[0]
    table = rebalanced_table(LOPSIDED, TEXT, max_load)
    assert before.max() > 2
    assert table.expert_load(counts).max() <= max(max_load, least_load(counts, 4, 1)) + 1e-9
    tokens_moved = counts[(table.expert_LVK != LOPSIDED.expert_LVK)[0, :, 0]].sum() / counts.sum()
    too_much = np.maximum(before - max_load, 0).sum() / 4
    assert too_much - 1e-9 <= tokens_moved <= too_much + 0.01
    assert table.made["table"] == {"sha256": LOPSIDED.sha256, "made": {"builder": "by hand"}}


def test_rebalancing_what_is_balanced_moves_nothing() -> None:
    for top_k in (1, 2):
        even = build_table("even", {}, TEXT, experts=4, top_k=top_k, blocks=(1, 2), seed=0)
        assert np.array_equal(rebalanced_table(even, TEXT, 1.3).expert_LVK, even.expert_LVK)


def test_replicated_and_merged_by_number() -> None:
    """As the experts of a model that is converted: each several times in a row, or so many in a row as one."""
    doubled = replicated_table(LOPSIDED, 2)
    assert (doubled.experts, doubled.blocks, doubled.tokenizer) == (8, (2,), "tokenizer")
    assert np.array_equal(doubled.expert_LVK // 2, LOPSIDED.expert_LVK)
    assert set((doubled.expert_LVK % 2).reshape(-1).tolist()) == {0, 1}
    assert merged_table(doubled, 2).sha256 == LOPSIDED.sha256
