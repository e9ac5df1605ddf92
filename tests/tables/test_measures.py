"""Load, cohesion and difference of tables, held against slow or plain arithmetic."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_array

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.builders import build_table
from stablemoe_ds.tables.counted_corpus import Corpus
from stablemoe_ds.tables.measures import cohesion, difference, measure, moved, mutual_information
from stablemoe_ds.tables.table import RoutingTable, least_load
from tests.tables.texts import corpus_of, random_stream, slow_followers, text_of_kinds


def slow_information(joint: NDArray[np.float64]) -> float:
    share = joint / joint.sum()
    return sum(
        share[x, y] * np.log(share[x, y] / (share[x].sum() * share[:, y].sum()))
        for x, y in zip(*share.nonzero(), strict=True)
    )


def slow_cohesion(expert_VK: NDArray[np.int32], experts: int, right: NDArray[np.float64]) -> float:
    kept = whole = 0.0
    for side in (right, right.T):
        joint = np.zeros((experts, len(side)))
        for index, row in enumerate(expert_VK):
            for expert in row:
                joint[expert] += side[index] / len(row)
        kept += slow_information(joint)
        whole += slow_information(side)
    return kept / whole


@pytest.mark.parametrize("top_k", [1, 2])
def test_cohesion_is_the_share_of_the_information(top_k: int) -> None:
    stream = random_stream(1, vocab=40, tokens=3000)
    random = np.random.default_rng(2)
    table = np.stack([random.permutation(6)[:top_k] for _ in range(40)]).astype(np.int32)
    found = cohesion(table, 6, corpus_of(stream, 40).followers())
    assert found == pytest.approx(slow_cohesion(table, 6, slow_followers(stream, 40, 1).astype(float)), rel=1e-9)


def test_cohesion_ends_at_nothing_and_all() -> None:
    followers = corpus_of(random_stream(1, vocab=40), 40).followers()
    assert cohesion(np.zeros((40, 1), np.int32), 4, followers) == pytest.approx(0, abs=1e-12)
    assert cohesion(np.arange(40, dtype=np.int32)[:, None], 40, followers) == pytest.approx(1)
    assert cohesion(np.zeros((3, 1), np.int32), 1, csr_array((3, 3), dtype=float)) == 1


def test_cohesion_does_not_ask_for_the_names_of_experts() -> None:
    text = text_of_kinds()
    table = build_table("cooccurrence", {}, text, experts=5, top_k=1, blocks=(1,), seed=0).expert_LVK[0]
    renamed = np.array([3, 0, 4, 1, 2], np.int32)[table]
    assert cohesion(renamed, 5, text.followers()) == pytest.approx(cohesion(table, 5, text.followers()))


def test_mutual_information_of_independent_counts_is_nothing() -> None:
    assert mutual_information(csr_array(np.outer([1.0, 2, 3], [4.0, 5]))) == pytest.approx(0, abs=1e-12)
    assert mutual_information(csr_array(np.eye(4))) == pytest.approx(np.log(4))


def test_measure_tells_load_bound_and_cohesion_of_each_layer() -> None:
    text = text_of_kinds()
    table = build_table("random", {}, text, experts=4, top_k=2, blocks=(2, 7), seed=5)
    first, second = measure(table, text)
    assert (first.block, second.block) == (2, 7)
    assert [first.max_load, second.max_load] == pytest.approx(table.expert_load(text.token_counts).max(1).tolist())
    assert first.least_load == least_load(text.token_counts, 4, 2)
    assert first.cohesion == cohesion(table.expert_LVK[0], 4, text.followers())
    assert 0 < first.cohesion_random < 1


def brute_force(one: NDArray[np.int32], other: NDArray[np.int32], weight: NDArray[np.float64], experts: int) -> float:
    """The smallest share that moves, over every renumbering."""
    best = 0.0
    for names in permutations(range(experts)):
        stays = sum(
            w * len({names[e] for e in a} & set(b))
            for a, b, w in zip(one.tolist(), other.tolist(), weight, strict=True)
        )
        best = max(best, stays)
    return 1 - best / (weight.sum() * one.shape[1])


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_moved_is_the_least_of_all_renumberings(seed: int, top_k: int) -> None:
    random = np.random.default_rng(seed)
    one, other = (np.stack([random.permutation(5)[:top_k] for _ in range(30)]).astype(np.int32) for _ in range(2))
    weight = random.random(30) ** 4
    assert moved(one, other, weight) == pytest.approx(brute_force(one, other, weight, 5))


def test_renumbered_experts_are_no_difference() -> None:
    text = text_of_kinds()
    one = build_table("even", {}, text, experts=4, top_k=1, blocks=(1, 3), seed=0)
    other = RoutingTable(np.array([2, 0, 3, 1], np.int32)[one.expert_LVK], 4, (1, 3), "tokenizer")
    for layer in difference(one, other, text):
        assert (layer.ids_moved, layer.tokens_moved) == (0, 0)


def test_one_id_that_moved() -> None:
    expert_LVK = np.array([0, 0, 1, 1, 2, 2], np.int32).reshape(1, 6, 1)
    changed = expert_LVK.copy()
    changed[0, 5] = 1
    counts = np.array([10, 10, 10, 10, 10, 50])
    (layer,) = difference(RoutingTable(expert_LVK, 3, (1,)), RoutingTable(changed, 3, (1,)), Corpus(counts))
    assert layer.ids_moved == pytest.approx(1 / 6)
    assert layer.tokens_moved == pytest.approx(0.3), "the heavy id keeps its expert 1, and ids 2, 3 and 4 move"
    (uncounted,) = difference(RoutingTable(expert_LVK, 3, (1,)), RoutingTable(changed, 3, (1,)))
    assert uncounted.tokens_moved is None


def test_tables_of_different_numbers_of_experts() -> None:
    whole = np.array([0, 0, 1, 1], np.int32).reshape(1, 4, 1)
    split = np.array([0, 1, 2, 2], np.int32).reshape(1, 4, 1)
    (layer,) = difference(RoutingTable(whole, 2, (1,)), RoutingTable(split, 3, (1,)))
    assert layer.ids_moved == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("shape", "tokenizer", "message"),
    [
        ((1, 5, 1), "a", "has 4 ids, the other table has 5"),
        ((2, 4, 1), "a", "one has 1 layers and 1 experts an id, the other 2 and 1"),
        ((1, 4, 2), "a", "the other 1 and 2"),
        ((1, 4, 1), "b", "of tokenizer a, the other table of b"),
    ],
)
def test_tables_that_cannot_be_compared(shape: tuple[int, int, int], tokenizer: str, message: str) -> None:
    one = RoutingTable(np.zeros((1, 4, 1), np.int32), 2, (1,), "a")
    other = RoutingTable(np.zeros(shape, np.int32), 2, tuple(range(1, shape[0] + 1)), tokenizer)
    with pytest.raises(UserError, match=message):
        difference(one, other)


def test_a_text_of_another_tokenizer_is_refused() -> None:
    text = text_of_kinds()
    table = RoutingTable(np.zeros((1, text.vocab_size, 1), np.int32), 2, (1,), "another")
    with pytest.raises(UserError, match="is of tokenizer another, the corpus of tokenizer: ids mean different pieces"):
        measure(table, text)
