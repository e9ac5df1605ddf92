"""A table whose hottest ids are split over several experts by the id before them, so that its load can be lower."""

from __future__ import annotations

import heapq
import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.builders import how_made
from stablemoe_ds.tables.counted_corpus import Corpus
from stablemoe_ds.tables.derived import rebalanced, source_of
from stablemoe_ds.tables.split_ids import WHOLE, SplitIds
from stablemoe_ds.tables.table import RoutingTable, least_load

GRAIN = 0.25
"""Size of a row of a split id, as a part of what an expert may serve: small enough to fill gaps."""


def split_table(table: RoutingTable, corpus: Corpus, max_load: float) -> RoutingTable:
    """The table with every id split that alone exceeds the limit, and then as few tokens moved as the limit requires.

    max_load: of an expert, as a multiple of the mean. Only experts of a pair of ids that alone exceeds it have more.
    Raises UserError for a corpus of other ids, for a table that splits ids already, and if no id exceeds the limit.
    """
    table.check_ids(corpus.tokenizer, corpus.vocab_size, "the corpus")
    if table.split is not None:
        raise UserError(
            f"the routing table splits {len(table.split.ids_J)} ids already: expected the table that it was made from, "
            f"{table.made.get('table', {}).get('sha256', 'which it does not name')[:12]}"
        )
    split = split_ids(corpus, table.experts, table.top_k, max_load)
    if split is None:
        forced = least_load(corpus.token_counts, table.experts, table.top_k)
        raise UserError(
            f"--max-load: got {max_load:g}: the commonest id of the text forces no more than {forced:.2f}, so no id "
            "has to be split: use 'stablemoe table build balanced'"
        )
    wide = table.with_rows_of(split)
    expert_LVK = rebalanced(wide, corpus.row_counts(split), max_load)
    made = how_made("split", options={"max_load": max_load}, corpus=corpus.fingerprint) | source_of(table)
    return replace(wide, expert_LVK=expert_LVK, made=made)


def split_ids(corpus: Corpus, experts: int, top_k: int, max_load: float) -> SplitIds | None:
    """The ids that alone exceed ``max_load`` times an expert's mean, each split into rows of about :data:`GRAIN` of it.

    The heaviest previous id first, each to the lightest row of its id; previous ids that were not seen are dealt to
    all rows in turn. None if there is no such id. Raises ValueError for a corpus without streams.
    """
    room = max_load * top_k * int(corpus.token_counts.sum()) / experts
    hot_J = np.flatnonzero(corpus.token_counts > room).astype(np.int32)
    if not len(hot_J):
        return None
    end, before_JV = document_end(corpus), corpus.count_before(hot_J)
    row_JV = np.empty(before_JV.shape, np.int32)
    shares: list[int] = []
    for place, (own, count_V) in enumerate(zip(hot_J, before_JV, strict=True)):
        rows = min(math.ceil(int(corpus.token_counts[own]) / (GRAIN * room)), int(np.count_nonzero(count_V)))
        group_V, load = _grouped(count_V, max(1, rows), end)
        row_JV[place] = np.where(group_V == 0, own, corpus.vocab_size + len(shares) - 1 + group_V)
        shares += (load[1:] / max(1, load.sum()) * WHOLE).astype(int).tolist()
    return SplitIds(hot_J, row_JV, np.array(shares, np.int32))


def document_end(corpus: Corpus) -> int | None:
    """The id that ends every document of the text; None if they have different ones."""
    ends = {int(i) for stream in corpus.streams for i in np.unique(stream.ids[np.cumsum(stream.lengths) - 1])}
    return ends.pop() if len(ends) == 1 else None


def _grouped(
    count_V: NDArray[np.float64], groups: int, end: int | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """int64 [V], the group of each previous id, and float64 [groups], the tokens of each; ``end`` is in group 0."""
    group_V = np.arange(len(count_V)) % groups
    load = np.zeros(groups)
    if end is not None:
        group_V[end], load[0] = 0, count_V[end]
    lightest = [(tokens, group) for group, tokens in enumerate(load)]
    heapq.heapify(lightest)
    for index in np.argsort(-count_V, kind="stable")[: np.count_nonzero(count_V)]:
        if index != end:
            tokens, group = lightest[0]
            group_V[index], load[group] = group, tokens + count_V[index]
            heapq.heapreplace(lightest, (load[group], group))
    return group_V, load
