"""Bounds and loads against counting token by token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables import held_out
from stablemoe_ds.tables.builders import random_table
from stablemoe_ds.tables.counted_corpus import IdStream
from stablemoe_ds.tables.expert_places import ExpertPlaces
from stablemoe_ds.tables.held_out import count_batches, split_documents
from stablemoe_ds.tables.load_bounds import bound, most_experts, reach, round_robin
from tests.tables.texts import corpus_of, random_stream


def test_the_last_documents_are_held_out() -> None:
    whole = corpus_of(random_stream(seed=1), 30)
    (stream,) = whole.streams
    text, held = split_documents(whole, 0.2)
    documents = len(stream.lengths)
    assert len(held.streams[0].lengths) == round(documents * 0.2)
    for part in (text, held):
        assert np.array_equal(part.token_counts, np.bincount(part.streams[0].ids, minlength=30))
        assert part.tokenizer == whole.tokenizer
    assert np.array_equal(np.concatenate([text.streams[0].ids, held.streams[0].ids]), stream.ids)
    assert np.array_equal(np.concatenate([text.streams[0].lengths, held.streams[0].lengths]), stream.lengths)


def test_at_least_one_document_is_held_out_and_one_is_kept() -> None:
    two = corpus_of(IdStream(np.arange(7), np.array([3, 4])), 10)
    assert [len(part.streams[0].lengths) for part in split_documents(two)] == [1, 1]
    with pytest.raises(UserError, match=r"has 1 document, expected at least 2 .*--heldout"):
        split_documents(corpus_of(IdStream(np.arange(7), np.array([7])), 10))


@pytest.mark.parametrize("batch", [1, 7, 100, 500, 900])
def test_batches_are_counted_whatever_the_size_of_the_pieces(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_stream(seed=2).ids
    monkeypatch.setattr(held_out, "PIECE", 11)
    counted = count_batches(ids, 30, batch).toarray()
    slow = [[list(ids[low : low + batch]).count(v) for v in range(30)] for low in range(0, len(ids), batch)]
    assert counted.tolist() == slow


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks", "replicated"), [(4, 1, 2, 0), (6, 3, 3, 0), (8, 2, 1, 0), (6, 2, 3, 2)]
)
def test_reach_is_what_counting_token_by_token_finds(experts: int, top_k: int, ranks: int, replicated: int) -> None:
    ids, batch, factors = random_stream(seed=3).ids, 64, (0.5, 1.0, 1.3)
    expert_VK = random_table(30, experts, top_k, 1, seed=4)[0]
    known = random_stream(seed=5).ids
    counts = np.bincount(known, minlength=30)
    found = reach("any", expert_VK, count_batches(ids, 30, batch), counts, experts, ranks, factors, replicated)

    served, dropped = [0] * experts, dict.fromkeys(factors, 0.0)
    for low in range(0, len(ids), batch):
        here = [0] * experts
        for token in ids[low : low + batch]:
            for expert in expert_VK[token]:
                here[expert] += 1
        for factor in factors:
            room = factor * sum(here) / experts
            dropped[factor] += sum(max(0.0, rows - room) for rows in here)
        served = [one + other for one, other in zip(served, here, strict=True)]
    pairs = len(ids) * top_k
    assert found.load_N == pytest.approx([rows * experts / pairs for rows in served])
    held = experts // ranks
    ranked = [sum(served[r * held : (r + 1) * held]) * ranks / pairs for r in range(ranks)]
    assert found.load_G == pytest.approx(ranked)
    known_load = [int((expert_VK[known] == expert).sum()) for expert in range(experts)]
    places = ExpertPlaces.by_load([known_load], ranks, replicated)
    copies = [sum(expert in places.held_by(r, 0) for r in range(ranks)) for expert in range(experts)]
    placed = [sum(served[e] / copies[e] for e in places.held_by(r, 0) if e >= 0) * ranks / pairs for r in range(ranks)]
    assert found.placed_G == pytest.approx(placed)
    assert found.dropped == pytest.approx([dropped[factor] / pairs for factor in factors])
    assert found.idle == pytest.approx(1 - (sum(ranked) / ranks) / max(ranked))


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_table_goes_below_the_bound(top_k: int) -> None:
    """Of all tables of four ids on three experts."""
    counts, experts = np.array([50, 25, 15, 10]), 3
    ids = np.repeat(np.arange(4), counts)
    limit = bound(counts, experts, top_k)
    assert (limit.commonest, limit.share) == (0, 0.5)
    assert limit.forced == pytest.approx(0.5 * experts / top_k)
    rows = list(itertools.combinations(range(experts), top_k))
    loads = [
        reach("", np.array(table, np.int32), count_batches(ids, 4, 100), counts, experts, 1, ()).max_load
        for table in itertools.product(rows, repeat=4)
    ]
    assert min(loads) >= limit.least - 1e-12
    if top_k == 1:
        assert min(loads) == pytest.approx(limit.least), "the bound is reached: one half, and the rest in two"


def test_how_many_experts_a_load_allows() -> None:
    counts = np.array([3, 27])
    for top_k, load in itertools.product((1, 2), (1.0, 1.2, 2.0)):
        most = most_experts(counts, top_k, load)
        assert bound(counts, most, top_k).forced <= load + 1e-12 < bound(counts, most + 1, top_k).forced
    assert most_experts(np.array([1] * 10), 1, 3.0) == 30, "in spite of rounding"


def test_round_robin_is_id_mod_n() -> None:
    assert round_robin(5, 3, 2).tolist() == [[0, 1], [1, 2], [2, 0], [0, 1], [1, 2]]
