"""What each expert of a layer has specialised in: which token ids it serves, and how much the id decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.tables.expert_load import relative_load
from stablemoe_ds.tables.table import RoutingTable, least_load

Piece = Callable[[int], str]
"""Token id to readable text."""


@dataclass(frozen=True)
class IdUse:
    """How often each id goes to each expert of one MoE layer, as M entries that occur.

    ids, experts, counts: int64 [M]; a pair of id and expert stands in one entry at most, a count is at least 1.
    block: number of the block the layer is at. expert_count: experts N of the layer. top_k: experts of a token.
    """

    block: int
    ids: NDArray[np.int64]
    experts: NDArray[np.int64]
    counts: NDArray[np.int64]
    expert_count: int
    top_k: int

    @property
    def served_N(self) -> NDArray[np.int64]:  # noqa: N802
        """int64 [N]: tokens each expert serves."""
        return _sums(self.experts, self.counts, self.expert_count)

    @property
    def load_N(self) -> NDArray[np.float64]:  # noqa: N802
        """float64 [N]: the same as a multiple of the mean."""
        return relative_load(self.served_N)

    @property
    def load_cv(self) -> float:
        """Coefficient of variation of the load: its standard deviation over its mean; 0 if even."""
        return float(self.load_N.std())

    @property
    def entropy_N(self) -> NDArray[np.float64]:  # noqa: N802
        """float64 [N], bits: entropy of the ids each expert sees; 0 where it is always the same one, or none."""
        served_N = self.served_N
        of_counts = np.bincount(self.experts, self.counts * np.log2(self.counts), self.expert_count)
        busy = served_N > 0
        bits = np.log2(served_N, where=busy, out=np.zeros(len(served_N)))
        return np.maximum(bits - of_counts / np.maximum(served_N, 1), 0.0)

    @property
    def cohesion_bits(self) -> float:
        """Mean of ``entropy_N`` over tokens: what is unknown of the id once the expert is known. Low: cohesive."""
        return float(self.entropy_N @ self.load_N / self.expert_count)

    @property
    def least_load(self) -> float:
        """The smallest max/mean load that any table could have on these tokens."""
        if not len(self.ids):
            return 1.0
        return least_load(_sums(self.ids, self.counts), self.expert_count, self.top_k)

    @property
    def load_entropy(self) -> float:
        """Entropy of the load over its largest value: 1 if even, 0 if one expert serves all."""
        return entropy_bits(self.served_N) / np.log2(self.expert_count) if self.expert_count > 1 else 1.0

    @property
    def id_decides(self) -> float:
        """Mutual information of id and expert over the entropy of the expert: the share of routing the id explains.

        1 for a top-1 table; 0 where experts ignore the id. Rare ids raise it in a small sample. 1 if there is
        nothing to explain, since one expert serves all.
        """
        of_expert = entropy_bits(self.served_N)
        if of_expert == 0:
            return 1.0
        joint, of_id = entropy_bits(self.counts), entropy_bits(_sums(self.ids, self.counts))
        return (of_id + of_expert - joint) / of_expert


def use_of_table(table: RoutingTable, layer: int, counts: NDArray[np.int64]) -> IdUse:
    """Where a table sends a text. counts: int64, of ids or rows, as :meth:`RoutingTable.counts_of_rows` takes them."""
    rows_V = table.counts_of_rows(counts)
    if rows_V.shape != table.expert_LVK.shape[1:2]:
        raise ValueError(f"expected counts of {table.vocab_size} ids, got shape {list(counts.shape)}")
    ids = np.repeat(table.id_of_row, table.top_k)
    keys = ids * table.experts + table.expert_LVK[layer].reshape(-1)
    count = np.repeat(rows_V, table.top_k)
    seen = count > 0
    pairs, of_key = np.unique(keys[seen], return_inverse=True)  # rows of one id may share an expert
    ids, experts, total = pairs // table.experts, pairs % table.experts, _sums(of_key, count[seen])
    return IdUse(table.blocks[layer], ids, experts, total, table.experts, table.top_k)


def use_of_pairs(
    ids: NDArray[np.integer], experts: NDArray[np.integer], expert_count: int, block: int, top_k: int = 1
) -> IdUse:
    """From recorded pairs, for routers that have no table: token p, of id ``ids[p]``, went to ``experts[p]``.

    ids, experts: int [P]; a token with several recorded experts stands there once for each, ``top_k`` times in all;
    one that no expert served, with a negative number, is left out.
    """
    served = experts >= 0
    ids, experts = ids[served], experts[served]
    keys, counts = np.unique(ids.astype(np.int64) * expert_count + experts, return_counts=True)
    return IdUse(block, keys // expert_count, keys % expert_count, counts.astype(np.int64), expert_count, top_k)


@dataclass(frozen=True)
class PieceUse:
    """One id an expert serves: how often, and that as a share of all the times the id is served."""

    id: int
    piece: str
    count: int
    share: float


@dataclass(frozen=True)
class ExpertProfile:
    """What one expert does.

    load: multiple of the mean. ids: distinct ids it serves. entropy_bits: of the ids it sees; 0 if always the same.
    pieces: the commonest first.
    """

    expert: int
    load: float
    ids: int
    entropy_bits: float
    pieces: list[PieceUse]


def describe_experts(use: IdUse, piece: Piece, top: int = 12) -> list[ExpertProfile]:
    """A profile of each expert, with its ``top`` commonest pieces; of equally common ones the lowest id first."""
    of_id = _sums(use.ids, use.counts)
    load_N, entropy_N = use.load_N, use.entropy_N
    profiles = []
    for expert in range(use.expert_count):
        mine = use.experts == expert
        ids, counts = use.ids[mine], use.counts[mine]
        order = np.lexsort((ids, -counts))[:top]
        pieces = [
            PieceUse(int(i), piece(int(i)), int(n), float(n / of_id[i]))
            for i, n in zip(ids[order], counts[order], strict=True)
        ]
        profiles.append(ExpertProfile(expert, float(load_N[expert]), len(ids), float(entropy_N[expert]), pieces))
    return profiles


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """Entropy of the distribution the counts make; 0 if there are none."""
    positive = counts[counts > 0].astype(np.float64)
    if len(positive) < 2:
        return 0.0
    share = positive / positive.sum()
    return float(-(share * np.log2(share)).sum())


def _sums(index: NDArray[np.int64], counts: NDArray[np.int64], size: int = 0) -> NDArray[np.int64]:
    """int64 [max(size, largest index + 1)]: counts added up by index."""
    total = np.zeros(max(size, int(index.max()) + 1 if len(index) else 0), dtype=np.int64)
    np.add.at(total, index, counts)
    return total
