"""How often one id follows another in a text that may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from stablemoe_ds.progress_bar import progress_bar

CHUNK = 1 << 22
"""Tokens that are counted at once; their pairs take 32 MiB."""
MOST_PAIRS = 1 << 27
"""Different pairs that are kept, in 12 bytes each. To count and weigh them, and to measure by them, takes up to 32."""
PAIRS = 1 << 16
"""Pairs that are computed with at once."""


def count_followers(
    ids: NDArray[Any],
    lengths: NDArray[np.integer],
    vocab: int,
    window: int = 1,
    chunk: int = CHUNK,
    most_pairs: int = MOST_PAIRS,
) -> csr_array:
    """int64 [vocab, vocab]: how often the column's id comes 1 to ``window`` places after the row's in a document.

    ids: integers [T] below ``vocab``, read ``chunk`` at a time. lengths: integers [D], ids of each document; the last
    id of one does not count as before the first of the next. Of a text with more than ``most_pairs`` different pairs
    the rarest so far are forgotten whenever there are too many (lossy counting, Manku and Motwani 2002), so that
    memory is bounded; otherwise the counts are exact, whatever the size of the chunks.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = _Sum(most_pairs)
    with progress_bar("neighbours", len(ids)) as advance:
        for start in range(0, len(ids), chunk):
            stop = min(start + chunk, len(ids))
            part = np.asarray(ids[start : stop + window], dtype=np.int64)
            document = _documents(ends, start, len(part))
            for distance in range(1, window + 1):
                earlier = min(stop - start, len(part) - distance)
                if earlier > 0:
                    same = document[:earlier] == document[distance : distance + earlier]
                    keys = (part[:earlier] * vocab + part[distance : distance + earlier])[same]
                    total.add(_counted(keys, vocab))
            advance(stop - start)
    return total.matrix(vocab)


def pairs_by_row(counts: csr_array) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """The pairs of a sparse matrix, :data:`PAIRS` at a time: where they are in its data, and int64, the row of each."""
    for start in range(0, counts.nnz, PAIRS):
        stop = min(start + PAIRS, counts.nnz)
        first, last = np.searchsorted(counts.indptr, [start, stop - 1], side="right") - 1
        ends = np.clip(counts.indptr[first : last + 2].astype(np.int64), start, stop)
        yield slice(start, stop), np.repeat(np.arange(first, last + 1), np.diff(ends))


def _documents(ends: NDArray[np.int64], start: int, size: int) -> NDArray[np.int64]:
    """int64 [size]: which document each id from ``start`` on belongs to, counted from the first of them."""
    first, last = np.searchsorted(ends, [start, start + size - 1], side="right")
    begins = np.zeros(size, dtype=np.int64)
    begins[ends[first:last] - start] = 1
    return np.cumsum(begins)


def _counted(keys: NDArray[np.int64], vocab: int) -> csr_array:
    """Sparse counts of pairs (row * vocab + column), whose order is lost."""
    keys.sort()
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    pairs = keys[first]
    counts = np.diff(first, append=len(keys))
    rows = np.searchsorted(pairs, np.arange(vocab + 1) * vocab)
    return csr_array((counts, (pairs % vocab).astype(np.int32), rows.astype(np.int32)), shape=(vocab, vocab))


class _Sum:
    """A sum of many sparse matrices.

    Parts are added to parts of about their size only, so that no count is copied more often than there are doublings.
    """

    def __init__(self, most: int) -> None:
        self._most, self._forgotten = most, 0
        self._parts: list[csr_array] = []

    def add(self, part: csr_array) -> None:
        self._parts.append(part)
        while len(self._parts) > 1 and self._parts[-2].nnz <= 2 * self._parts[-1].nnz:
            self._merge_last()
        if sum(part.nnz for part in self._parts) > self._most:
            while len(self._parts) > 1:
                self._merge_last()
            self._forget()

    def matrix(self, vocab: int) -> csr_array:
        """The sum of all that was added: int64 [vocab, vocab]."""
        while len(self._parts) > 1:
            self._merge_last()
        return self._parts[0] if self._parts else csr_array((vocab, vocab), dtype=np.int64)

    def _merge_last(self) -> None:
        last = self._parts.pop()
        self._parts[-1] = self._parts[-1] + last

    def _forget(self) -> None:
        """Drop the rarest pairs until half of the room is free, more frequent ones each time it fills up again."""
        (whole,) = self._parts
        while whole.nnz > self._most // 2:
            self._forgotten += 1
            whole.data[whole.data <= self._forgotten] = 0
            whole.eliminate_zeros()
        self._parts = [whole]
