"""Ids that have several rows in a routing table: the id before a token says which of them it follows.

All tokens of an id go to the same experts, so the commonest id bounds the load of a table (:func:`least_load`). A split
id takes its experts from several rows instead. Routes are still a function of token ids alone, known before a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE = 1 << 22
"""Tokens that are looked up at a time."""
WHOLE = 1_000_000
"""What ``share_Q`` is given in parts of."""


@dataclass(frozen=True)
class SplitIds:
    """Which row of a table each token of a split id follows.

    ids_J: int32 [J], ascending. row_JV: int32 [J, V], the row of such an id behind each id: its own, numbered as the id
    is, or a further one, V to V + Q - 1, which no other id has. share_Q: int32 [Q], how many of a million of an id's
    tokens followed each further row in the text that it was split by; it serves estimates of load, not routing.

    A token with nothing before it, the first of a sequence, follows its own row. So does the first of a document, if
    ``row_JV`` has the own row behind the id that ends documents: then documents do not see each other.
    Raises ValueError for arrays that contradict this.
    """

    ids_J: NDArray[np.int32]  # noqa: N815
    row_JV: NDArray[np.int32]  # noqa: N815
    share_Q: NDArray[np.int32]  # noqa: N815

    def __post_init__(self) -> None:
        arrays = (self.ids_J, self.row_JV, self.share_Q)
        shapes = [array.shape for array in arrays]
        if any(array.dtype != np.int32 for array in arrays) or [len(shape) for shape in shapes] != [1, 2, 1]:
            raise ValueError(f"split ids: expected int32 [J], [J, V] and [Q], got {[list(shape) for shape in shapes]}")
        if not 0 < len(self.ids_J) == len(self.row_JV) or (np.diff(self.ids_J, prepend=-1) <= 0).any():
            raise ValueError(f"split ids: expected ascending ids, each with a line of rows, got {self.ids_J.tolist()}")
        if self.ids_J[-1] >= self.vocab_size:
            raise ValueError(f"split ids: id {self.ids_J[-1]} is outside 0..{self.vocab_size - 1}")
        if (self.share_Q < 0).any() or (self._shares() > WHOLE).any():
            raise ValueError("split ids: rows have less than none or more than all of the tokens of their id")
        for array in arrays:
            array.setflags(write=False)

    @property
    def vocab_size(self) -> int:
        return self.row_JV.shape[1]

    @property
    def further_rows(self) -> int:
        """Q: rows that split ids have besides their own."""
        return len(self.share_Q)

    @cached_property
    def owner_Q(self) -> NDArray[np.int64]:  # noqa: N802
        """int64 [Q]: which of ``ids_J`` each further row belongs to. Raises ValueError unless it is exactly one."""
        owner_Q = np.full(self.further_rows, -1)
        for place, (own, row_V) in enumerate(zip(self.ids_J, self.row_JV, strict=True)):
            rows = np.unique(row_V)
            further = rows[rows != own] - self.vocab_size
            if ((further < 0) | (further >= len(owner_Q))).any() or (owner_Q[further] >= 0).any():
                raise ValueError(f"split ids: id {own} has a row that does not exist or that another id has")
            owner_Q[further] = place
        if (owner_Q < 0).any():
            raise ValueError(f"split ids: no id has row {int(owner_Q.argmin()) + self.vocab_size}")
        return owner_Q

    @property
    def id_of_row(self) -> NDArray[np.int64]:
        """int64 [V + Q]: the id whose tokens follow each row."""
        return np.concatenate([np.arange(self.vocab_size), self.ids_J[self.owner_Q]])

    def _shares(self) -> NDArray[np.int64]:
        """int64 [J]: millionths of each id's tokens that follow further rows."""
        total_J = np.zeros(len(self.ids_J), np.int64)
        np.add.at(total_J, self.owner_Q, self.share_Q)
        return total_J

    @cached_property
    def place_V(self) -> NDArray[np.int32]:  # noqa: N802
        """int32 [V]: where in ``ids_J`` an id is; -1 if it is not split."""
        place_V = np.full(self.vocab_size, -1, np.int32)
        place_V[self.ids_J] = np.arange(len(self.ids_J))
        return place_V

    def rows(self, ids: NDArray[Any]) -> NDArray[np.int64]:
        """int64 [..., S]: the row that each token follows. ids: integers [..., S], sequences from their first token."""
        rows = ids.astype(np.int64)
        place = self.place_V[ids[..., 1:]]
        rows[..., 1:] = np.where(place < 0, rows[..., 1:], self.row_JV[place, ids[..., :-1]])
        return rows

    def rows_in_pieces(self, ids: NDArray[Any], start: int = 0, end: int | None = None) -> Iterator[NDArray[np.int64]]:
        """:meth:`rows` of tokens ``start`` to ``end`` of a text [T], as much at a time as fits in memory."""
        end = len(ids) if end is None else end
        for low in range(start, end, PIECE):
            seen = max(0, low - 1)
            yield self.rows(np.asarray(ids[seen : min(low + PIECE, end)]))[low - seen :]

    def estimated_counts(self, token_counts: NDArray[np.integer]) -> NDArray[np.int64]:
        """int64 [V + Q]: how often each row is followed in a text of these counts [V], by ``share_Q``."""
        of_id_J = token_counts[self.ids_J].astype(np.int64)
        further_Q = of_id_J[self.owner_Q] * self.share_Q // WHOLE
        counts = np.concatenate([token_counts.astype(np.int64), further_Q])
        np.subtract.at(counts, self.ids_J[self.owner_Q], further_Q)
        return counts
