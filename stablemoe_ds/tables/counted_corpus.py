"""What a table is made from and judged by: how often each id occurs in a text, and which ids follow which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from stablemoe_ds.tables.neighbours import count_followers
from stablemoe_ds.tables.split_ids import PIECE, SplitIds


@dataclass(frozen=True)
class IdStream:
    """The ids of one corpus, document after document.

    ids: integers [T], in memory or mapped from disk. lengths: integers [D], ids of each document, none 0, T in sum.
    weight: what one occurrence counts, where corpora are blended.
    """

    ids: NDArray[Any]
    lengths: NDArray[np.integer]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if int(self.lengths.sum()) != len(self.ids) or (len(self.lengths) and self.lengths.min() < 1):
            raise ValueError(f"{len(self.lengths)} lengths do not cut {len(self.ids)} ids into documents")


@dataclass(frozen=True)
class Corpus:
    """A text as tables see it.

    token_counts: int64 [V], how often each id occurs. streams: the ids themselves, for what looks at neighbours.
    tokenizer: fingerprint of the tokenizer that made the ids. fingerprint: digest of the text, kept with a table.
    """

    token_counts: NDArray[np.int64]
    streams: Sequence[IdStream] = ()
    tokenizer: str = ""
    fingerprint: str = ""
    _followers: dict[int, csr_array] = field(default_factory=dict, repr=False, compare=False)

    @property
    def vocab_size(self) -> int:
        return len(self.token_counts)

    def followers(self, window: int = 1) -> csr_array:
        """float64 [V, V]: how often the column's id comes at most ``window`` places after the row's in a document.

        Counted once for each window: a table is made and measured by the same counts.
        """
        if window not in self._followers:
            shape = (self.vocab_size, self.vocab_size)
            total = None
            for stream in self.streams:
                pairs = count_followers(stream.ids, stream.lengths, self.vocab_size, window)
                weighted = csr_array((pairs.data * stream.weight, pairs.indices, pairs.indptr), shape=shape)
                total = weighted if total is None else total + weighted
            self._followers[window] = csr_array(shape, dtype=np.float64) if total is None else total
        return self._followers[window]

    def count_before(self, ids_J: NDArray[np.integer]) -> NDArray[np.float64]:
        """float64 [J, V]: how often each of these ids comes right behind each id, across the ends of documents, too.

        The text is read in pieces. Raises ValueError for a corpus of counts alone.
        """
        self._check_streams()
        vocab = self.vocab_size
        place_V = np.full(vocab, -1)
        place_V[ids_J] = np.arange(len(ids_J))
        count_JV = np.zeros((len(ids_J), vocab))
        for stream in self.streams:
            for start in range(0, len(stream.ids), PIECE):
                piece = np.asarray(stream.ids[max(0, start - 1) : start + PIECE], np.int64)
                place = place_V[piece[1:]]
                found = place >= 0
                keys, counts = np.unique(place[found] * vocab + piece[:-1][found], return_counts=True)
                count_JV.reshape(-1)[keys] += counts * stream.weight
        return count_JV

    def row_counts(self, split: SplitIds | None) -> NDArray[np.int64]:
        """int64 [V + Q]: how often a table that splits these ids has each of its rows followed; [V] for None.

        Raises ValueError for a corpus of counts alone.
        """
        if split is None:
            return self.token_counts
        self._check_streams()
        total = np.zeros(split.vocab_size + split.further_rows)
        for stream in self.streams:
            for rows in split.rows_in_pieces(stream.ids):
                total += np.bincount(rows, minlength=len(total)) * stream.weight
        return np.rint(total).astype(np.int64)

    def _check_streams(self) -> None:
        if not self.streams:
            raise ValueError("a corpus of counts alone does not say which id follows which")
