"""A table of another one: with each expert several times, with experts merged by number, or with its load limited."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.errors import UserError
from stablemoe_ds.progress_bar import progress_bar
from stablemoe_ds.tables.balanced_choice import balanced_choices, steps_of_choice
from stablemoe_ds.tables.builders import how_made
from stablemoe_ds.tables.counted_corpus import Corpus
from stablemoe_ds.tables.table import RoutingTable, least_load


def replicated_table(table: RoutingTable, times: int) -> RoutingTable:
    """Each expert's ids dealt to ``times`` experts in turn, which are copies of it in a converted model."""
    copy_V1 = np.arange(table.expert_LVK.shape[1], dtype=np.int32)[:, None] % times
    expert_LVK, experts = table.expert_LVK * np.int32(times) + copy_V1, table.experts * times
    return derived(table, expert_LVK, experts, how_made("resized", experts=experts))


def merged_table(table: RoutingTable, times: int) -> RoutingTable:
    """The ids of each ``times`` experts on one, by number, as a converted model takes the mean of their weights.

    Raises UserError if an id would go to the same expert twice.
    """
    expert_LVK = table.expert_LVK // np.int32(times)
    ordered = np.sort(expert_LVK, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise UserError(
            "moe.experts: ids whose experts are merged would go to the same one twice; nearest that works: a model of "
            "top_k 1"
        )
    experts = table.experts // times
    return derived(table, expert_LVK, experts, how_made("resized", experts=experts))


def rebalanced_table(table: RoutingTable, corpus: Corpus, max_load: float) -> RoutingTable:
    """The table with as many tokens of the corpus as possible where they were, and no expert above the limit.

    max_load: as a multiple of the mean; where the commonest id forces more, that is the limit. Ids that do not occur
    stay where they are. Raises UserError for a corpus of other ids.
    """
    table.check_ids(corpus.tokenizer, corpus.vocab_size, "the corpus")
    made = how_made("balanced", options={"max_load": max_load}, corpus=corpus.fingerprint)
    counts_V = corpus.row_counts(table.split)
    limit = max(max_load, least_load(counts_V, table.experts, table.top_k))
    return derived(table, rebalanced(table, counts_V, limit), table.experts, made)


def rebalanced(table: RoutingTable, counts_V: NDArray[np.int64], limit: float) -> NDArray[np.int32]:
    """int32 [L, V, K]: the experts of :func:`rebalanced_table`; rows of split ids move one by one, as ids do.

    counts_V: int64 [V], how often each row is followed. limit: experts of a row that alone exceeds it have no other.
    """
    expert_LVK = table.expert_LVK.copy()
    with progress_bar("experts", expert_LVK[:, 0].size * steps_of_choice(counts_V)) as advance:
        for old_VK, new_VK in zip(table.expert_LVK, expert_LVK, strict=True):
            stays_VN = np.zeros((len(old_VK), table.experts))
            np.put_along_axis(stays_VN, old_VK.astype(np.int64), 1.0, axis=1)
            chosen_VK = balanced_choices(stays_VN, counts_V, limit, table.top_k, advance)
            moved_V = (np.sort(chosen_VK, axis=1) != np.sort(old_VK, axis=1)).any(1) & (counts_V > 0)
            new_VK[moved_V] = chosen_VK[moved_V]
    return expert_LVK


def source_of(table: RoutingTable) -> dict[str, object]:
    """What a table that is made of ``table`` says of it."""
    return {"table": {"sha256": table.sha256, "made": dict(table.made)}}


def derived(table: RoutingTable, expert_LVK: NDArray[np.int32], experts: int, made: dict[str, object]) -> RoutingTable:
    """A table with the layers and ids of ``table``, which is named in how it was made."""
    return replace(table, expert_LVK=expert_LVK, experts=experts, made=made | source_of(table))
