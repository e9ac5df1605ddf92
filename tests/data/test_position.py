"""Whatever changes between two starts, no token is read again while its corpus has unread ones; none is left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stablemoe_ds.data.epoch_order import EpochOrder
from stablemoe_ds.data.position import Cut, Epoch, Order, Position, SourcePosition, Window


class Numbered:
    """Documents of a corpus whose tokens are numbered from 0, so that an id says which token it is."""

    def __init__(self, lengths: list[int]) -> None:
        self.sequence_lengths = np.array(lengths, np.int32)
        self.starts = np.cumsum([0, *lengths])
        self.firsts = set(self.starts[:-1].tolist())

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        assert length is not None
        assert 0 < length <= self.sequence_lengths[idx] - offset
        return self.starts[idx] + offset + np.arange(length)


@dataclass
class Start:
    """One start of a run: what it may change, and how far it comes."""

    weights: Sequence[int]
    length: int
    seed: int
    updates: list[int]
    """Sequences of each."""


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Numbered], list[Start]]:
    corpora = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=20), min_size=1, max_size=3))
    texts = [Numbered([*lengths, 3]) for lengths in corpora]
    shortest = min(text.tokens for text in texts)
    start = st.builds(
        Start,
        weights=st.sampled_from([w for w in product(range(3), repeat=len(texts)) if any(w)]),
        length=st.integers(1, shortest),
        seed=st.integers(0, 2),
        updates=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    )
    return texts, draw(st.lists(start, min_size=3, max_size=9))


class Counts:
    """How often each token came. A round is over when all have come equally often."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.seen = tokens, set[int]()

    def add(self, token: int) -> None:
        assert token not in self.seen, "comes again while others have not come"
        self.seen.add(token)
        if len(self.seen) == self.tokens:
            self.seen.clear()


class Reader:
    """Reads what positions name, and counts how often each token was read and was a label."""

    def __init__(self, texts: list[Numbered]) -> None:
        self.texts = texts
        self.counts = [[Counts(text.tokens), Counts(text.tokens)] for text in texts]
        self.orders: dict[Order, EpochOrder] = {}
        self.read = 0

    def take(self, window: Window) -> None:
        order, number = window.order, int(window.order.source)
        text, (tokens, labels) = self.texts[number], self.counts[number]
        if order not in self.orders:
            self.orders[order] = EpochOrder(text, order)
        pairs = self.orders[order].read(window.index)
        assert pairs.shape == (2, order.length)
        for token, label in pairs.T.tolist():
            assert label in text.firsts if token + 1 in text.firsts or token + 1 == text.tokens else label == token + 1
            tokens.add(token)
            labels.add(label)
        self.read += order.length


@settings(max_examples=200, deadline=None)
@given(runs())
def test_no_token_is_read_again_while_others_are_unread(run: tuple[list[Numbered], list[Start]]) -> None:
    texts, starts = run
    reader, position = Reader(texts), Position()
    for start in starts:
        parts = {str(n): weight / sum(start.weights) for n, weight in enumerate(start.weights) if weight}
        corpora = {name: SourcePosition(name, texts[int(name)].tokens, start.seed) for name in parts}
        position = Position.parse(json.loads(json.dumps(asdict(position)))).under(corpora, parts, start.length)
        for sequences in start.updates:
            skipped = position.skip(sequences)
            windows, position = position.take(sequences)
            assert skipped == position
            for window in windows:
                reader.take(window)
            assert position.tokens == reader.read
    epochs = [source.epoch for source in position.sources.values()]
    event(f"epochs: {min(4, 1 + max(epoch.number for epoch in epochs))}")
    event(f"cuts of an epoch: {min(4, max(len(epoch.cuts) for epoch in epochs))}")
    event(f"carried tokens: {any(epoch.carried for epoch in epochs)}")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_order_depends_on_neither_updates_nor_stops(updates: list[int], weights: list[int]) -> None:
    parts = {str(n): weight / sum(weights) for n, weight in enumerate(weights)}
    corpora = {name: SourcePosition(name, 40 + 7 * int(name), 1) for name in parts}
    position = Position().under(corpora, parts, 8)
    whole, end = position.take(sum(updates))
    cut: list[Window] = []
    for sequences in updates:
        windows, position = position.take(sequences)
        position = Position.parse(json.loads(json.dumps(asdict(position)))).under(corpora, parts, 8)
        cut += windows
    assert cut == whole
    assert position == end


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(1, 300))
def test_blend_follows_its_weights(weights: list[float], count: int) -> None:
    parts = {str(n): weight / sum(weights) for n, weight in enumerate(weights)}
    start = Position().under({name: SourcePosition(name, 100, 1) for name in parts}, parts, 4)
    _, position = start.take(count)
    assert sum(position.given.values()) == count
    assert all(abs(position.given[name] - part * count) <= len(parts) for name, part in parts.items())


def test_counts_of_the_blend_begin_again_with_other_weights() -> None:
    """A corpus that joins late does not make up for what it has not given before."""
    start = SourcePosition("", 1000, 1)
    _, position = Position().under({"a": start}, {"a": 1.0}, 10).take(50)
    position = position.under({"a": start, "b": start}, {"a": 0.5, "b": 0.5}, 10)
    windows, position = position.take(20)
    assert [sum(window.order.source == name for window in windows) for name in "ab"] == [10, 10]
    assert [window.index for window in windows if window.order.source == "a"] == list(range(50, 60))
    _, alone = position.under({"b": start}, {"b": 1.0}, 10).take(5)
    windows, _ = alone.under({"a": start}, {"a": 1.0}, 10).take(1)
    assert windows[0].index == 60, "a corpus that was left out for a while goes on where it was"


def test_another_seed_leaves_what_was_begun_in_its_order() -> None:
    _, position = Position().under({"a": SourcePosition("", 100, 1)}, {"a": 1.0}, 10).take(3)
    windows, _ = position.under({"a": SourcePosition("", 100, 2)}, {"a": 1.0}, 10).take(20)
    assert {window.order.seed for window in windows} == {1}


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 25, 1000])
def test_skipping_is_taking(count: int) -> None:
    start = SourcePosition("", 103, 1)
    _, position = Position().under({"a": start}, {"a": 1.0}, 10).take(count)
    assert start.skip(10, count) == position.sources["a"]
    assert start.skip(10, count).total == 10 * count


def test_epochs_are_shuffled_each_in_its_own_way() -> None:
    """Documents and sequences; the second one has another order, of the same tokens."""
    text = Numbered([5, 9, 2, 8, 8, 4, 4])
    one, other, seeded = (EpochOrder(text, Order("", seed, Epoch(n), None, 4)) for seed, n in ((1, 0), (1, 1), (2, 0)))
    rows = [np.concatenate([order.read(i)[0] for i in range(10)]).tolist() for order in (one, other, seeded)]
    assert all(sorted(row) == list(range(40)) for row in rows)
    assert all(a != b for a, b in pairwise([*rows, rows[0]]))


def test_large_numbers() -> None:
    """A corpus of 10^12 tokens; only what is read is held against memory."""
    start = SourcePosition("", 10**12 + 1, 1, Epoch(3, 5, (Cut(4096, 10**8),)), Epoch(2))
    (window,), after = start.take("a", 4096, 1)
    assert window.index == 10**8
    assert start.skip(4096, 1) == after
    assert after.total == start.total + 4096 == 3 * (10**12 + 1) - 5 + 4096 * (10**8 + 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"length": 0},
        {"given": {"a": -1}},
        {"sources": {"a": {"path": "a", "tokens": 0, "seed": 1}}},
        {"sources": {"a": {"path": "a", "tokens": 9, "seed": 1, "epoch": {"cuts": [{"length": 4}]}}}},
        {"sources": []},
        [],
    ],
)
def test_what_is_no_position(fields: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        Position.parse(fields)
