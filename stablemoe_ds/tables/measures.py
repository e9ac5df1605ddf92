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
    loads = table.expert_load(corpus.token_counts).max(1)
    return [
        LayerMeasure(block, float(load), least, cohesion(expert_VK, table.experts, followers_VV), by_chance)
        for block, load, expert_VK in zip(table.blocks, loads, table.expert_LVK, strict=True)
    ]


def cohesion(expert_VK: NDArray[np.int32], experts: int, followers_VV: csr_array) -> float:
    """How much of what an id says about its neighbours its expert still says: 0 to 1.

    The mutual information of expert and neighbouring id over that of id and neighbouring id, left and right neighbours
    added up: the share that is kept if ids are known by their experts only, which Brown et al. (1992, "Class-Based
    n-gram Models of Natural Language") make classes of words by. With several experts an id counts as a part of each.
    1 if there is nothing to keep.
    """
    vocab, top_k = expert_VK.shape
    weight = np.full(expert_VK.size, 1 / top_k)
    member_NV = csr_array((weight, (expert_VK.reshape(-1), np.repeat(np.arange(vocab), top_k))), shape=(experts, vocab))
    kept = whole = 0.0
    for neighbours_VV in (followers_VV, followers_VV.T.tocsr()):
        kept += mutual_information(csr_array(member_NV @ neighbours_VV))
        whole += mutual_information(neighbours_VV)
    return kept / whole if whole > 0 else 1.0


def mutual_information(counts: csr_array) -> float:
    """Of row and column of a table of counts, in nats; at least 0."""
    pairs = counts.tocoo()
    rows, columns, total = counts.sum(1), counts.sum(0), counts.sum()
    share = pairs.data / total if total else pairs.data
    ratio = pairs.data * (total / rows[pairs.coords[0]]) / columns[pairs.coords[1]]
    return max(0.0, float(share @ np.log(ratio, where=pairs.data > 0, out=np.zeros_like(share))))


@dataclass(frozen=True)
class LayerDifference:
    """One layer of a table against another's, experts renumbered so that most stays.

    ids_moved: share of the ids' places with experts that are others. tokens_moved: the same of tokens, where counts are
    known; experts are renumbered for it so that most tokens stay.
    """

    block: int
    ids_moved: float
    tokens_moved: float | None


def difference(
    one: RoutingTable, other: RoutingTable, token_counts: NDArray[np.int64] | None = None
) -> list[LayerDifference]:
    """Layer by layer, what the other table does differently, whatever it calls its experts.

    token_counts: int64 [V]. Tables may have different numbers of experts; then some have no counterpart and all their
    ids move. Raises UserError if the tables are of different ids, layers or choices of an id.
    """
    one.check_ids(other.tokenizer, other.vocab_size, "the other table")
    if len(one.blocks) != len(other.blocks) or one.top_k != other.top_k:
        raise UserError(
            f"the tables cannot be compared: one has {len(one.blocks)} layers and {one.top_k} experts an id, "
            f"the other {len(other.blocks)} and {other.top_k}"
        )
    every_V = np.ones(one.vocab_size)
    return [
        LayerDifference(
            block,
            moved(left_VK, right_VK, every_V),
            None if token_counts is None else moved(left_VK, right_VK, token_counts.astype(np.float64)),
        )
        for block, left_VK, right_VK in zip(one.blocks, one.expert_LVK, other.expert_LVK, strict=True)
    ]


def moved(one_VK: NDArray[np.int32], other_VK: NDArray[np.int32], weight_V: NDArray[np.float64]) -> float:
    """Share of the weight, 0 to 1, that is elsewhere after the best matching of experts (Kuhn 1955)."""
    shape = (int(one_VK.max()) + 1, int(other_VK.max()) + 1)
    together_NN = np.zeros(shape)
    for one_V in one_VK.T:
        for other_V in other_VK.T:
            np.add.at(together_NN, (one_V, other_V), weight_V)
    stays = together_NN[linear_sum_assignment(together_NN, maximize=True)].sum()
    total = weight_V.sum() * one_VK.shape[1]
    return float(1 - stays / total) if total else 0.0
