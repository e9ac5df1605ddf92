"""What a table is made from and judged by: how often each id occurs in a text, and which ids follow which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from stablemoe_ds.tables.neighbours import count_followers


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
            total = csr_array((self.vocab_size, self.vocab_size), dtype=np.float64)
            for stream in self.streams:
                total = total + count_followers(stream.ids, stream.lengths, self.vocab_size, window) * stream.weight
            self._followers[window] = total
        return self._followers[window]
