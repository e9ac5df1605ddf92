"""Specialisation against counting by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from stablemoe_ds.evaluation.specialisation import describe_experts, entropy_bits, use_of_pairs, use_of_table
from stablemoe_ds.tables.table import RoutingTable

VOCAB, EXPERTS = 30, 4


@pytest.fixture
def pairs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    ids = rng.zipf(1.5, 4000) % VOCAB
    experts = np.where(rng.random(4000) < 0.7, ids % EXPERTS, rng.integers(0, EXPERTS, 4000))
    return ids.astype(np.int32), experts.astype(np.int16)


def slow_entropy(values) -> float:
    counts = Counter(values)
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


def test_entropy():
    assert entropy_bits(np.array([4, 4, 0, 4, 4])) == pytest.approx(2.0)
    assert entropy_bits(np.array([9])) == entropy_bits(np.array([], dtype=np.int64)) == 0.0


def test_pairs_against_counting(pairs):
    ids, experts = pairs
    use = use_of_pairs(ids, experts, EXPERTS, block=6)
    counts = Counter(experts.tolist())
    assert use.served_N.tolist() == [counts[i] for i in range(EXPERTS)]
    assert use.load_N.tolist() == pytest.approx([counts[i] / 1000 for i in range(EXPERTS)])
    assert use.load_entropy == pytest.approx(slow_entropy(experts.tolist()) / 2)
    mutual = slow_entropy(ids.tolist()) + slow_entropy(experts.tolist()) - slow_entropy(list(zip(*pairs, strict=True)))
    assert use.id_decides == pytest.approx(mutual / slow_entropy(experts.tolist()))
    assert 0.1 < use.id_decides < 0.9
    assert use.least_load == pytest.approx(max(Counter(ids.tolist()).values()) / 1000)


def test_profiles_against_counting(pairs):
    ids, experts = pairs
    profiles = describe_experts(use_of_pairs(ids, experts, EXPERTS, block=6), piece=lambda i: f"<{i}>", top=5)
    assert [profile.expert for profile in profiles] == [0, 1, 2, 3]
    for expert, profile in enumerate(profiles):
        mine = Counter(ids[experts == expert].tolist())
        ranked = sorted(mine, key=lambda i: (-mine[i], i))[:5]
        assert [(p.id, p.count) for p in profile.pieces] == [(i, mine[i]) for i in ranked]
        assert [p.piece for p in profile.pieces] == [f"<{i}>" for i in ranked]
        assert [p.share for p in profile.pieces] == pytest.approx([mine[i] / (ids == i).sum() for i in ranked])
        assert profile.ids == len(mine)
        assert profile.entropy_bits == pytest.approx(slow_entropy(ids[experts == expert].tolist()))
    assert sum(profile.load for profile in profiles) == pytest.approx(EXPERTS)


def test_table_and_pairs_agree():
    rng = np.random.default_rng(2)
    table = RoutingTable(rng.integers(0, EXPERTS, (2, VOCAB, 1)).astype(np.int32), EXPERTS, (3, 6))
    ids = rng.integers(0, VOCAB - 5, 500)
    by_table = use_of_table(table, 1, np.bincount(ids, minlength=VOCAB))
    by_pairs = use_of_pairs(ids, table.expert_LVK[1, ids, 0], EXPERTS, block=6)
    assert by_table.block == 6
    assert describe_experts(by_table, str) == describe_experts(by_pairs, str)
    assert by_table.id_decides == pytest.approx(1.0)
    np.testing.assert_allclose(by_table.load_N, table.expert_load(np.bincount(ids, minlength=VOCAB))[1])


def test_top_k_counts_each_choice():
    table = RoutingTable(np.array([[[0, 1], [1, 2], [0, 2]]], dtype=np.int32), 3, (1,))
    use = use_of_table(table, 0, np.array([10, 5, 0]))
    assert use.served_N.tolist() == [10, 15, 5]
    assert use.least_load == 1.0  # id 0 is 2/3 of the text: 10 of the 10 that each expert has on average
    assert use_of_table(table, 0, np.array([20, 5, 0])).least_load == pytest.approx(20 / (2 * 25 / 3))
    assert [[p.count for p in e.pieces] for e in describe_experts(use, str)] == [[10], [10, 5], [5]]


def test_of_equally_common_pieces_the_lowest_id_comes_first():
    table = RoutingTable(np.zeros((1, 5, 1), dtype=np.int32), 1, (1,))
    (profile,) = describe_experts(use_of_table(table, 0, np.array([3, 7, 3, 7, 3])), str, top=4)
    assert [use.id for use in profile.pieces] == [1, 3, 0, 2]


def test_an_expert_or_a_text_without_tokens_is_no_error():
    table = RoutingTable(np.zeros((1, 3, 1), dtype=np.int32), 2, (1,))
    use = use_of_table(table, 0, np.array([1, 2, 3]))
    idle = describe_experts(use, str)[1]
    assert (idle.load, idle.ids, idle.entropy_bits, idle.pieces) == (0.0, 0, 0.0, [])
    assert (use.load_entropy, use.id_decides) == (0.0, 1.0)
    empty = use_of_table(table, 0, np.zeros(3, dtype=np.int64))
    assert (empty.load_N.tolist(), empty.least_load) == ([0.0, 0.0], 1.0)


def test_counts_of_another_vocabulary_are_refused():
    table = RoutingTable(np.zeros((1, 3, 1), dtype=np.int32), 2, (1,))
    with pytest.raises(ValueError, match="3 ids"):
        use_of_table(table, 0, np.ones(4, dtype=np.int64))
