"""A text in two: one part to make tables from, one that they have not seen to judge them by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.counted_corpus import Corpus, IdStream
from stablemoe_ds.tables.split_ids import SplitIds

SHARE = 0.1
"""Of the documents, the last ones, rounded to at least one."""
PIECE = 1 << 24
"""Tokens that are counted at a time."""


def split_documents(corpus: Corpus, share: float = SHARE) -> tuple[Corpus, Corpus]:
    """The first documents of a corpus of one stream, and the last ``share`` of them; ids stay where they are.

    Raises UserError if there is only one document.
    """
    (stream,) = corpus.streams
    documents = len(stream.lengths)
    if documents < 2:
        raise UserError(
            f"the corpus has {documents} document, expected at least 2 to hold the last ones out: name another text "
            "with --heldout"
        )
    kept = documents - max(1, round(documents * share))
    border = int(stream.lengths[:kept].sum(dtype=np.int64))
    parts = (
        IdStream(stream.ids[:border], stream.lengths[:kept]),
        IdStream(stream.ids[border:], stream.lengths[kept:]),
    )
    first, last = (_corpus_of(part, corpus) for part in parts)
    return first, last


def _corpus_of(stream: IdStream, whole: Corpus) -> Corpus:
    counts_V = np.asarray(count_batches(stream.ids, whole.vocab_size, len(stream.ids)).sum(0), np.int64)
    return Corpus(counts_V, (stream,), whole.tokenizer, f"{len(stream.lengths)} documents of {whole.fingerprint}")


def count_batches(
    ids: NDArray[np.integer], vocab_size: int, batch_tokens: int, split: SplitIds | None = None
) -> csr_array:
    """int64 [batches, V]: how often each id occurs in each of the batches that a text [T] is cut into, in order.

    T is at least 1. The last batch may be shorter. Ids are read in pieces of a bounded size. split: count the rows of a
    table that splits these ids, [batches, V + Q].
    """
    rows = vocab_size + (split.further_rows if split else 0)
    starts = range(0, len(ids), batch_tokens)
    counts, columns, ends = [], [], [0]
    for start in starts:
        batch_V = np.zeros(rows, np.int64)
        end = min(start + batch_tokens, len(ids))
        pieces = (ids[low : min(low + PIECE, end)] for low in range(start, end, PIECE))
        for piece in split.rows_in_pieces(ids, start, end) if split else pieces:
            batch_V += np.bincount(piece, minlength=rows)
        occurring = np.flatnonzero(batch_V)
        counts.append(batch_V[occurring])
        columns.append(occurring)
        ends.append(ends[-1] + len(occurring))
    return csr_array((np.concatenate(counts), np.concatenate(columns), ends), shape=(len(starts), rows))
