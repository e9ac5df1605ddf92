"""A table on more experts or fewer: alike experts become one, an expert becomes several of ids that are alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from stablemoe_ds.config.table_options import VectorOptions
from stablemoe_ds.errors import UserError
from stablemoe_ds.progress_bar import progress_bar
from stablemoe_ds.tables.balanced_choice import next_choice, steps_of_choice
from stablemoe_ds.tables.builders import how_made
from stablemoe_ds.tables.counted_corpus import Corpus
from stablemoe_ds.tables.derived import derived
from stablemoe_ds.tables.kmeans import spherical_kmeans
from stablemoe_ds.tables.table import RoutingTable, least_load
from stablemoe_ds.tables.vectors import id_vectors, unit_rows

HOME = 4.0
"""What an expert that an id's old one has become is worth more than any other: above all differences of cosines."""


def resized_table(
    table: RoutingTable, corpus: Corpus, experts: int, max_load: float = 1.3, seed: int = 0
) -> RoutingTable:
    """The table on ``experts`` experts; ids that shared one still do, as far as number and load limit allow.

    Fewer experts: those with the most similar ids are merged. More: each expert becomes as many as its load asks for,
    clusters of its ids. Ids are alike as in :func:`cooccurrence_table`. An id with several experts that become one
    takes the most similar other. Ids that do not occur are dealt to what their expert has become.

    max_load: of an expert, as a multiple of the mean; where the commonest id forces more, that is the limit.
    Raises UserError for a corpus of other ids, and for fewer experts than an id has.
    """
    table.check_ids(corpus.tokenizer, corpus.vocab_size, "the corpus")
    if experts < table.top_k:
        raise UserError(f"--experts: got {experts}: expected at least {table.top_k}, as many as the table gives an id")
    counts_R = corpus.row_counts(table.split)
    vectors_RD = id_vectors(corpus.followers(), VectorOptions(), seed)[table.id_of_row]
    limit = max(max_load, least_load(counts_R, experts, table.top_k))
    layers = [
        _Layer(old_RK, table.experts, vectors_RD, counts_R).resized(experts, limit, [seed, layer])
        for layer, old_RK in enumerate(table.expert_LVK)
    ]
    made = how_made("resized", options={"max_load": max_load}, experts=experts, seed=seed, corpus=corpus.fingerprint)
    return derived(table, np.stack(layers), experts, made)


class _Layer:
    """One layer of the table that is resized. R: rows, of ids and of what split ids have besides."""

    def __init__(
        self,
        old_RK: NDArray[np.int32],
        experts: int,
        vectors_RD: NDArray[np.float64],
        counts_R: NDArray[np.int64],
    ) -> None:
        self._old_RK, self._vectors_RD, self._counts_R = old_RK, vectors_RD, counts_R
        rows, top_k = old_RK.shape
        ones = np.ones(old_RK.size)
        self._member_MR = csr_array((ones, (old_RK.reshape(-1), np.arange(rows).repeat(top_k))), shape=(experts, rows))
        self._load_M = self._member_MR @ counts_R / max(1, top_k * counts_R.sum())
        self._weights_R = np.sqrt(counts_R)

    def resized(self, experts: int, limit: float, seed: list[int]) -> NDArray[np.int32]:
        """int32 [R, K]. limit: of an expert's load, as a multiple of the mean."""
        home_MN, centroids_ND = (
            self._merged(experts, limit) if experts <= len(self._load_M) else self._divided(experts, seed)
        )
        counts_R, top_k = self._counts_R, self._old_RK.shape[1]
        alike_RN = self._vectors_RD @ centroids_ND.T
        absent = np.flatnonzero(counts_R == 0)
        alike_RN[absent] = np.random.default_rng(seed).random((len(absent), experts))  # nothing is known of them
        load_N, new_RK = np.zeros(experts), np.empty(self._old_RK.shape, np.int32)
        with progress_bar("experts", top_k * steps_of_choice(counts_R)) as advance:
            for choice in range(top_k):
                room = (choice + 1) * limit * counts_R.sum() / experts
                scores_RN = alike_RN + HOME * home_MN[self._old_RK[:, choice]]
                new_RK[:, choice] = next_choice(scores_RN, counts_R, load_N, room, advance)
                alike_RN[np.arange(len(alike_RN)), new_RK[:, choice]] = -np.inf
        return new_RK

    def _merged(self, experts: int, limit: float) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """bool [M, N], which new expert each old one is part of, and float64 [N, D], the direction of its ids.

        Pair by pair, those first whose ids then still have the most similarity to their common centroid, among pairs
        that stay within the limit; if there is none, the pair that has the fewest tokens.
        """
        part_M, load_N = np.arange(len(self._load_M)), self._load_M * experts
        sum_ND = self._member_MR @ (self._weights_R[:, None] * self._vectors_RD)
        while len(load_N) > experts:
            length_N = np.linalg.norm(sum_ND, axis=1)
            joint_NN = length_N[:, None] ** 2 + length_N**2 + 2 * sum_ND @ sum_ND.T
            lost_NN = length_N[:, None] + length_N - np.sqrt(np.maximum(joint_NN, 0))
            load_NN = load_N[:, None] + load_N
            cost_NN = np.where(load_NN <= limit, lost_NN, lost_NN.max() + load_NN)
            np.fill_diagonal(cost_NN, np.inf)
            one, other = sorted(divmod(int(cost_NN.argmin()), len(load_N)))
            sum_ND[one] += sum_ND[other]
            load_N[one] += load_N[other]
            sum_ND, load_N = np.delete(sum_ND, other, axis=0), np.delete(load_N, other)
            part_M[part_M == other] = one
            part_M[part_M > other] -= 1
        return part_M[:, None] == np.arange(experts), unit_rows(sum_ND)

    def _divided(self, experts: int, seed: list[int]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """bool [M, N], what each old expert has become, and float64 [N, D], centroids of its clusters of ids."""
        parts_M = np.ones(len(self._load_M), np.int64)
        while parts_M.sum() < experts:
            parts_M[(self._load_M / parts_M).argmax()] += 1
        centroids = []
        with progress_bar("clusters", len(parts_M)) as advance:
            for expert, parts in enumerate(parts_M.tolist()):
                own = self._member_MR[[expert]].indices
                centroids.append(spherical_kmeans(self._vectors_RD[own], self._weights_R[own], parts, [*seed, expert]))
                advance(1)
        part_of_N = np.arange(len(parts_M)).repeat(parts_M)
        return np.arange(len(parts_M))[:, None] == part_of_N, np.concatenate(centroids)
