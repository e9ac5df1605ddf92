"""Tables from a corpus alone that keep ids of like use together, or on purpose apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.config.table_options import CooccurrenceOptions, CrossedOptions, ScatteredOptions
from stablemoe_ds.progress_bar import progress_bar
from stablemoe_ds.tables.balanced_choice import balanced_choices, steps_of_choice
from stablemoe_ds.tables.counted_corpus import Corpus
from stablemoe_ds.tables.kmeans import RESTARTS, ROUNDS, spherical_kmeans, weighted_centroids
from stablemoe_ds.tables.placing import deal_absent, greedy_choices, heaviest_first
from stablemoe_ds.tables.table import least_load
from stablemoe_ds.tables.vectors import id_vectors, unit_rows

ALTERNATIONS = 5
"""Balanced choices and new centroids in turn, for ``choice: alternating``."""


def cooccurrence_table(
    corpus: Corpus, options: CooccurrenceOptions, experts: int, top_k: int, layers: int, seed: int
) -> NDArray[np.int32]:
    """int32 [L, V, K]: an expert is a cluster of ids that have like neighbours (docs/method.md, "Tables from counts").

    Clusters are spherical k-means of the ids' vectors, each weighted by the square root of its count; then each id
    goes to the ``top_k`` nearest ones that a load of ``options.max_load`` allows. Ids that do not occur are dealt out.
    """
    vectors_VD = id_vectors(corpus.followers(options.window), options, seed)
    table_LVK = np.empty((layers, corpus.vocab_size, top_k), dtype=np.int32)
    for layer in range(layers):
        own = layer if options.layers != "same" else 0
        seen_VD = unit_rows(vectors_VD[:, own::layers]) if options.layers == "slices" else vectors_VD
        table_LVK[layer] = _clustered(seen_VD, corpus.token_counts, options, experts, top_k, [seed, own])
        deal_absent(table_LVK[layer], corpus.token_counts, experts, [seed, own])
    return table_LVK


def crossed_table(
    corpus: Corpus, options: CrossedOptions, experts: int, top_k: int, layers: int, seed: int
) -> NDArray[np.int32]:
    """int32 [L, V, K]: each choice has experts of its own, so that few ids have all of theirs in common.

    The first choice is that of :func:`cooccurrence_table`. The others are drawn, the commonest ids first, among experts
    with room. Of the experts, each choice has as many as the others, or one more.
    """
    counts_V = corpus.token_counts
    table_LVK = np.empty((layers, corpus.vocab_size, top_k), dtype=np.int32)
    for choice, share in enumerate(np.array_split(np.arange(experts), top_k)):
        # A load limit is a multiple of the mean of all experts, and shares need not be equal.
        of_share = options.model_copy(update={"max_load": options.max_load * len(share) * top_k / experts})
        if choice == 0:
            table_LVK[..., :1] = cooccurrence_table(corpus, of_share, len(share), 1, layers, seed)
            continue
        limit = _limit(of_share, counts_V, len(share), 1)
        for layer in range(layers):
            drawn = [seed, layer, choice]
            scores_VN = np.random.default_rng(drawn).random((len(counts_V), len(share)))
            drawn_V1 = greedy_choices(scores_VN, counts_V, limit, 1)
            deal_absent(drawn_V1, counts_V, len(share), drawn)
            table_LVK[layer, :, choice] = share[0] + drawn_V1[:, 0]
    return table_LVK


def scattered_table(
    corpus: Corpus, options: ScatteredOptions, experts: int, top_k: int, layers: int, seed: int
) -> NDArray[np.int32]:
    """int32 [L, V, K]: the opposite of :func:`cooccurrence_table`, ids of like use in different experts.

    The commonest ids first, each to the ``top_k`` experts whose ids so far are least like it, among those with room
    for it. Layers differ in which of equal experts come first. Ids that do not occur are dealt out.
    """
    counts_V = corpus.token_counts
    vectors_VD = id_vectors(corpus.followers(options.window), options, seed)
    room = _limit(options, counts_V, experts, top_k) * top_k * counts_V.sum() / experts
    table_LVK = np.empty((layers, corpus.vocab_size, top_k), dtype=np.int32)
    for layer in range(layers):
        order_N = np.random.default_rng([seed, layer]).permutation(experts)
        sum_ND, load_N = np.zeros((experts, vectors_VD.shape[1])), np.zeros(experts)
        heaviest = heaviest_first(counts_V)
        with progress_bar("experts", len(heaviest)) as advance:
            for index in heaviest:
                alike_N = unit_rows(sum_ND) @ vectors_VD[index]
                full_N = load_N + counts_V[index] > room
                chosen = np.lexsort((order_N, load_N, alike_N, np.where(full_N, load_N, 0)))[:top_k]
                table_LVK[layer, index] = chosen
                sum_ND[chosen] += np.sqrt(counts_V[index]) * vectors_VD[index]
                load_N[chosen] += counts_V[index]
                advance(1)
        deal_absent(table_LVK[layer], counts_V, experts, [seed, layer])
    return table_LVK


def _clustered(
    vectors_VD: NDArray[np.float64],
    counts_V: NDArray[np.int64],
    options: CooccurrenceOptions,
    experts: int,
    top_k: int,
    seed: list[int],
) -> NDArray[np.int32]:
    """int32 [V, K]: experts of one layer."""
    limit, weights_V = _limit(options, counts_V, experts, top_k), np.sqrt(counts_V)
    with progress_bar("clusters", RESTARTS * ROUNDS) as advance:
        centroids_ND = spherical_kmeans(vectors_VD, weights_V, experts, seed, advance)
    if options.choice == "nearest":
        return np.argsort(-(vectors_VD @ centroids_ND.T), axis=1, kind="stable")[:, :top_k].astype(np.int32)
    if options.choice == "greedy":
        with progress_bar("experts", int(np.count_nonzero(counts_V))) as advance:
            return greedy_choices(vectors_VD @ centroids_ND.T, counts_V, limit, top_k, advance)
    alternations = ALTERNATIONS if options.choice == "alternating" else 0
    with progress_bar("experts", (alternations + top_k) * steps_of_choice(counts_V)) as advance:
        single = max(options.max_load, least_load(counts_V, experts, 1))
        for _ in range(alternations):
            choice_V1 = balanced_choices(vectors_VD @ centroids_ND.T, counts_V, single, 1, advance)
            centroids_ND = weighted_centroids(vectors_VD, weights_V, choice_V1[:, 0], centroids_ND)
        return balanced_choices(vectors_VD @ centroids_ND.T, counts_V, limit, top_k, advance)


def _limit(options: ScatteredOptions, counts_V: NDArray[np.int64], experts: int, top_k: int) -> float:
    """The largest max/mean load that is asked for, or what the commonest id forces."""
    return max(options.max_load, least_load(counts_V, experts, top_k))
