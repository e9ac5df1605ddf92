"""Counts of neighbours, held against counting them one by one."""

from __future__ import annotations

import tracemalloc
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array

from stablemoe_ds.config.table_options import VectorOptions
from stablemoe_ds.tables import counted_corpus, neighbours
from stablemoe_ds.tables.counted_corpus import Corpus, IdStream
from stablemoe_ds.tables.measures import cohesion
from stablemoe_ds.tables.neighbours import count_followers, pairs_by_row
from stablemoe_ds.tables.vectors import id_vectors
from tests.tables.texts import corpus_of, random_stream, slow_followers, text_of_kinds


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 499, 500, 10_000])
def test_counts_do_not_depend_on_the_chunks(chunk: int, window: int) -> None:
    stream = random_stream(1)
    counts = count_followers(stream.ids, stream.lengths, 30, window, chunk)
    assert counts.dtype == np.int64
    assert np.array_equal(counts.toarray(), slow_followers(stream, 30, window))


def test_documents_are_no_neighbours() -> None:
    ids, lengths = np.array([1, 2, 3, 1, 2, 1], np.uint16), np.array([3, 2, 1])
    counts = count_followers(ids, lengths, 4, window=3, chunk=2).toarray()
    assert {(int(a), int(b)): int(counts[a, b]) for a, b in zip(*counts.nonzero(), strict=True)} == {
        (1, 2): 2,
        (2, 3): 1,
        (1, 3): 1,
    }


@pytest.mark.parametrize("ids", [[], [3]], ids=["empty", "one id"])
def test_nothing_to_count(ids: list[int]) -> None:
    array = np.array(ids, np.uint16)
    counts = count_followers(array, np.ones(len(ids), np.int64), 5, window=2)
    assert counts.shape == (5, 5)
    assert counts.nnz == 0


def test_the_largest_pair_of_a_large_vocabulary() -> None:
    """Row times vocabulary plus column is more than 32 bits hold."""
    vocab = 1 << 18
    counts = count_followers(np.array([vocab - 1] * 3 + [0], np.int32), np.array([4]), vocab)
    assert (counts[vocab - 1, vocab - 1], counts[vocab - 1, 0], counts.sum()) == (2, 1, 3)


class Watched:
    """An array that remembers the largest slice anybody took of it."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array, self.largest = array, 0

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, part: slice) -> np.ndarray[Any, Any]:
        self.largest = max(self.largest, len(self.array[part]))
        return self.array[part]


def test_no_more_than_a_chunk_is_read_at_once() -> None:
    stream = random_stream(2, tokens=5000)
    watched: Any = Watched(stream.ids)
    count_followers(watched, stream.lengths, 30, window=2, chunk=100)
    assert watched.largest == 102


def test_memory_is_bounded_by_the_pairs_that_are_kept() -> None:
    """Of more pairs than there is room for the common ones stay, with nearly all of their counts."""
    random = np.random.default_rng(0)
    vocab, tokens = 2000, 200_000
    ids = random.integers(0, vocab, tokens)
    ids[::4], ids[1::4] = 7, 8  # a quarter of all pairs
    lengths = np.array([tokens])
    exact = count_followers(ids, lengths, vocab)
    bounded = count_followers(ids, lengths, vocab, chunk=5000, most_pairs=20_000)
    assert exact.nnz > 50_000
    assert bounded.nnz <= 20_000
    assert bounded[7, 8] == exact[7, 8] == tokens // 4
    assert (bounded.toarray() <= exact.toarray()).all()


@pytest.mark.parametrize(("sides", "most"), [("both", 32), ("right", 32), ("left", 32), ("joined", 58)])
def test_bytes_for_each_pair(sides: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting, weighing and measuring, as docs/method.md says; what does not grow with the pairs is small here."""
    monkeypatch.setattr(neighbours, "PAIRS", 1 << 12)
    monkeypatch.setattr(counted_corpus, "count_followers", partial(count_followers, chunk=1 << 13))
    text, expert_VK = text_of_kinds(vocab=2000, tokens=500_000, absent=0), np.zeros((2000, 1), np.int32)
    expert_VK[::2] = 1
    tracemalloc.start()
    try:
        pairs = text.followers()
        id_vectors(pairs, VectorOptions.model_validate({"sides": sides, "dims": 2}), 0)
        cohesion(expert_VK, 2, pairs)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert pairs.nnz > 150_000
    assert peak <= most * pairs.nnz


def test_pairs_and_their_rows_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = csr_array(np.random.default_rng(0).poisson(0.3, (12, 9)))
    for size in (1, 2, 7, 1000):
        monkeypatch.setattr(neighbours, "PAIRS", size)
        found = [(row, counts.indices[pairs]) for pairs, row in pairs_by_row(counts)]
        assert all(len(row) <= size for row, _ in found)
        rows, columns = (np.concatenate(part) for part in zip(*found, strict=True))
        assert np.array_equal(np.stack([rows, columns]), np.stack(counts.tocoo().coords))
    assert list(pairs_by_row(csr_array((3, 3)))) == []


def test_blended_corpora_count_by_their_weights() -> None:
    one, two = random_stream(1), random_stream(2)
    heavy = IdStream(two.ids, two.lengths, weight=2.5)
    blend = Corpus(np.zeros(30, np.int64), (one, heavy))
    wanted = slow_followers(one, 30, 1) + 2.5 * slow_followers(two, 30, 1)
    assert np.array_equal(blend.followers().toarray(), wanted)
    assert blend.followers() is blend.followers(), "counted once"


def test_a_window_is_counted_for_itself() -> None:
    corpus = corpus_of(random_stream(3), 30)
    for window in (1, 3):
        assert np.array_equal(corpus.followers(window).toarray(), slow_followers(corpus.streams[0], 30, window))


@pytest.mark.parametrize("lengths", [[2, 2], [5, 0], [6]])
def test_documents_that_do_not_fit_their_ids_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not cut 5 ids"):
        IdStream(np.zeros(5, np.uint16), np.array(lengths))
