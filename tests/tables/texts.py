"""Small texts for the tests of tables: ids of a few kinds, each kind with its own neighbours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.tables.counted_corpus import Corpus, IdStream
from stablemoe_ds.tables.split_ids import WHOLE, SplitIds
from stablemoe_ds.tables.table import RoutingTable

KINDS, VOCAB = 4, 200
"""Id i is of kind i % KINDS; a word of one kind is followed by one of the next."""


def random_stream(seed: int, vocab: int = 30, tokens: int = 500) -> IdStream:
    """Ids without rhyme or reason, in documents of 1 to 40."""
    random = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(int(random.integers(1, 41)), tokens - sum(lengths)))
    return IdStream(random.integers(0, vocab, tokens).astype(np.uint16), np.array(lengths, np.int32))


def corpus_of(stream: IdStream, vocab: int) -> Corpus:
    counts = np.bincount(stream.ids, minlength=vocab).astype(np.int64)
    return Corpus(counts, (stream,), "tokenizer", "text")


def text_of_kinds(seed: int = 0, tokens: int = 40_000, vocab: int = VOCAB, absent: int = 20) -> Corpus:
    """A text by Zipf's law in which the kind of an id says which kind comes next, nine times out of ten.

    absent: ids at the end of the vocabulary that do not occur.
    """
    random = np.random.default_rng(seed)
    rank = np.arange((vocab - absent) // KINDS)
    share = 1 / (rank + 3)
    drawn = random.choice(rank, size=tokens, p=share / share.sum())
    steps = np.where(random.random(tokens) < 0.9, 1, random.integers(0, KINDS, tokens))
    ids = drawn * KINDS + np.cumsum(steps) % KINDS
    return corpus_of(IdStream(ids.astype(np.int32), np.full(tokens // 100, 100, np.int32)), vocab)


def slow_followers(stream: IdStream, vocab: int, window: int) -> NDArray[np.int64]:
    """Pair by pair, document by document."""
    counts = np.zeros((vocab, vocab), np.int64)
    for document in np.split(stream.ids.astype(int), np.cumsum(stream.lengths)[:-1]):
        for place, one in enumerate(document):
            for other in document[place + 1 : place + 1 + window]:
                counts[one, other] += 1
    return counts


def split_at_random(table: RoutingTable, ids: list[int], further: int, seed: int = 0) -> RoutingTable:
    """A table that splits these ids over ``further`` rows each besides their own, all with experts drawn at random."""
    random = np.random.default_rng(seed)
    row_JV = random.integers(0, further + 1, (len(ids), table.vocab_size))
    row_JV[:, : further + 1] = np.arange(further + 1)  # each row is somewhere
    for place, own in enumerate(ids):
        row_JV[place] = np.where(row_JV[place] == 0, own, table.vocab_size + place * further + row_JV[place] - 1)
    share_Q = np.full(len(ids) * further, WHOLE // (further + 2), np.int32)
    wide = table.with_rows_of(SplitIds(np.array(ids, np.int32), row_JV.astype(np.int32), share_Q))
    drawn = random.random((*wide.expert_LVK.shape[:2], table.experts)).argsort(-1)[..., : table.top_k]
    expert_LVK = wide.expert_LVK.copy()
    expert_LVK[:, table.vocab_size :] = drawn[:, table.vocab_size :]
    return replace(wide, expert_LVK=expert_LVK)


def slow_experts(table: RoutingTable, sequence: list[int]) -> list[list[list[int]]]:
    """For each layer and token of one sequence its experts, looked up one by one."""
    found: list[list[list[int]]] = [[] for _ in table.blocks]
    for place, index in enumerate(sequence):
        row = index
        if table.split is not None and place > 0 and index in table.split.ids_J.tolist():
            row = int(table.split.row_JV[table.split.ids_J.tolist().index(index)][sequence[place - 1]])
        for layer, expert_VK in enumerate(table.expert_LVK):
            found[layer].append(expert_VK[row].tolist())
    return found
