"""Small texts for the tests of tables: ids of a few kinds, each kind with its own neighbours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.tables.counted_corpus import Corpus, IdStream

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
