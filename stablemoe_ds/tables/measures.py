"""What a table is like on a text, before a model is trained: how even, how cohesive, how far from another one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.builders import random_table
from stablemoe_ds.tables.counted_corpus import Corpus
from stablemoe_ds.tables.neighbours import pairs_by_row
from stablemoe_ds.tables.table import RoutingTable, least_load


@dataclass(frozen=True)
class LayerMeasure:
    """One layer of a table on a text.

    max_load: of its experts, as a multiple of the mean. least_load: what no table can go below (docs/method.md).
    cohesion: see :func:`cohesion`. cohesion_random: that of a random table of the same shape.
    """

    block: int
    max_load: float
    least_load: float
    cohesion: float
    cohesion_random: float


def measure(table: RoutingTable, corpus: Corpus) -> list[LayerMeasure]:
    """Every layer on a text. Raises UserError if the text is of another tokenizer or vocabulary than the table."""
    table.check_ids(corpus.tokenizer, corpus.vocab_size, "the corpus")
    followers_VV = corpus.followers()
    random_VK = random_table(table.vocab_size, table.experts, table.top_k, 1, seed=0)[0]
    by_chance = cohesion(random_VK, table.experts, followers_VV)
    least = least_load(corpus.token_counts, table.experts, table.top_k)
    counts = corpus.row_counts(table.split)
    loads, share = table.expert_load(counts).max(1), None if table.split is None else _share_of_rows(table, counts)
    return [
        LayerMeasure(block, float(load), least, cohesion(expert_VK, table.experts, followers_VV, share), by_chance)
        for block, load, expert_VK in zip(table.blocks, loads, table.expert_LVK, strict=True)
    ]


def _share_of_rows(table: RoutingTable, counts: NDArray[np.int64]) -> csr_array:
    """float64 [V + Q, V]: which share of the column's id follows each row, by how often rows are followed."""
    ids, rows = table.id_of_row, np.arange(len(counts))
    of_id_V = np.bincount(ids, weights=counts, minlength=table.vocab_size)
    share = np.where(of_id_V[ids] > 0, counts / np.maximum(of_id_V[ids], 1), rows == ids)
    return csr_array((share, (rows, ids)), shape=(len(counts), table.vocab_size))


def cohesion(
    expert_VK: NDArray[np.int32], experts: int, followers_VV: csr_array, share: csr_array | None = None
) -> float:
    """How much of what an id says about its neighbours its expert still says: 0 to 1.

    The mutual information of expert and neighbouring id over that of id and neighbouring id, left and right neighbours
    added up: the share that is kept if ids are known by their experts only, which Brown et al. (1992, "Class-Based
    n-gram Models of Natural Language") make classes of words by. With several experts an id counts as a part of each.
    share: float64 [rows, V], the part of each id in each row, where ids are split. 1 if there is nothing to keep.
    """
    rows, top_k = expert_VK.shape
    weight = np.full(expert_VK.size, 1 / top_k)
    member_NV = csr_array((weight, (expert_VK.reshape(-1), np.repeat(np.arange(rows), top_k))), shape=(experts, rows))
    if share is not None:
        member_NV = csr_array(member_NV @ share)
    # Which of the two is called the row does not matter, so the large counts need not be transposed.
    kept = mutual_information(member_NV @ followers_VV) + mutual_information(followers_VV @ member_NV.T)
    whole = 2 * mutual_information(followers_VV)
    return float(kept / whole) if whole > 0 else 1.0


def mutual_information(counts: csr_array) -> float:
    """Of row and column of a table of counts, in nats; at least 0."""
    rows, columns, total = counts.sum(1), counts.sum(0), counts.sum()
    found = 0.0
    for pairs, row in pairs_by_row(counts):
        seen = counts.data[pairs] > 0
        count, row, column = counts.data[pairs][seen], row[seen], counts.indices[pairs][seen]
        found += float(count @ np.log(count * (total / rows[row]) / columns[column]))
    return max(0.0, found / total) if total else 0.0


@dataclass(frozen=True)
class LayerDifference:
    """One layer of a table against another's, experts renumbered so that most stays.

    ids_moved: share of the ids' places with experts that are others. tokens_moved: the same of tokens, where counts are
    known; experts are renumbered for it so that most tokens stay. moved_V: float64 [V], how many of each id's tokens
    that is, with several experts for an id in parts of tokens.
    """

    block: int
    ids_moved: float
    tokens_moved: float | None = None
    moved_V: NDArray[np.float64] | None = None  # noqa: N815


def difference(one: RoutingTable, other: RoutingTable, corpus: Corpus | None = None) -> list[LayerDifference]:
    """Layer by layer, what the other table does differently, whatever it calls its experts.

    corpus: to count tokens; without one, an id that either of them splits counts alike behind every id. Tables may
    have different numbers of experts; then some have no counterpart and all their ids move. Raises UserError if the
    tables are of different ids, layers or choices of an id.
    """
    one.check_ids(other.tokenizer, other.vocab_size, "the other table")
    if len(one.blocks) != len(other.blocks) or one.top_k != other.top_k:
        raise UserError(
            f"the tables cannot be compared: one has {len(one.blocks)} layers and {one.top_k} experts an id, "
            f"the other {len(other.blocks)} and {other.top_k}"
        )
    left, right, ids, tokens = _rows_of_both(one, other, corpus)
    layers = []
    for block, left_VK, right_VK in zip(one.blocks, one.expert_LVK, other.expert_LVK, strict=True):
        before_RK, after_RK = left_VK[left], right_VK[right]
        ids_moved = moved(before_RK, after_RK, ids)
        if tokens is None:
            layers.append(LayerDifference(block, ids_moved))
            continue
        moved_V = np.zeros(one.vocab_size)
        np.add.at(moved_V, one.id_of_row[left], moved_share(before_RK, after_RK, tokens) * tokens)
        layers.append(LayerDifference(block, ids_moved, float(moved_V.sum() / max(1, tokens.sum())), moved_V))
    return layers


def _rows_of_both(
    one: RoutingTable, other: RoutingTable, corpus: Corpus | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64] | None]:
    """Rows of one and of the other that the same tokens follow; the ids that these are, and the tokens, as weights.

    All ids that neither splits, and then each that one does behind every id.
    """
    vocab = one.vocab_size
    split = np.flatnonzero(_is_split(one) | _is_split(other))
    plain = np.setdiff1d(np.arange(vocab), split)
    pairs = np.stack([np.tile(np.arange(vocab), len(split)), np.repeat(split, vocab)], axis=1)
    left, right = (np.concatenate([plain, table.rows(pairs)[:, 1]]) for table in (one, other))
    ids = np.concatenate([np.ones(len(plain)), np.full(len(pairs), 1 / vocab)])
    if corpus is None:
        return left, right, ids, None
    if not len(split):
        return left, right, ids, corpus.token_counts.astype(np.float64)
    return left, right, ids, np.concatenate([corpus.token_counts[plain], corpus.count_before(split).reshape(-1)])


def _is_split(table: RoutingTable) -> NDArray[np.bool_]:
    """bool [V]: ids that a table splits."""
    return np.zeros(table.vocab_size, bool) if table.split is None else table.split.place_V >= 0


def moved(one_VK: NDArray[np.int32], other_VK: NDArray[np.int32], weight_V: NDArray[np.float64]) -> float:
    """Share of the weight, 0 to 1, that is elsewhere after the best matching of experts."""
    total = weight_V.sum()
    return float(moved_share(one_VK, other_VK, weight_V) @ weight_V / total) if total else 0.0


def moved_share(
    one_VK: NDArray[np.int32], other_VK: NDArray[np.int32], weight_V: NDArray[np.float64]
) -> NDArray[np.float64]:
    """float64 [V]: which part of each row's K experts is another, after the best matching of experts (Kuhn 1955)."""
    together_NN = np.zeros((int(one_VK.max()) + 1, int(other_VK.max()) + 1))
    for one_V in one_VK.T:
        for other_V in other_VK.T:
            np.add.at(together_NN, (one_V, other_V), weight_V)
    counterpart_N = np.full(len(together_NN), -1)
    matched, counterparts = linear_sum_assignment(together_NN, maximize=True)
    counterpart_N[matched] = counterparts
    stays_VK = (counterpart_N[one_VK][..., None] == other_VK[:, None]).any(-1)
    return np.asarray(1 - stays_VK.mean(1))
