"""Clusters of directions: k-means by cosine (Dhillon and Modha 2001), each vector with a weight."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from stablemoe_ds.progress_bar import Advance, unwatched
from stablemoe_ds.tables.vectors import unit_rows

RESTARTS, ROUNDS = 4, 100


def spherical_kmeans(
    vectors_VD: NDArray[np.float64],
    weights_V: NDArray[np.float64],
    clusters: int,
    seed: int | list[int],
    advance: Advance = unwatched,
) -> NDArray[np.float64]:
    """float64 [clusters, D]: unit centroids with the largest sum over vectors of weight * cosine that was found.

    vectors_VD: [V, D], of length 1 or 0. weights_V: [V], at least 0. The best of several starts; each ends when no
    vector changes its cluster. A cluster that no vector is nearest to begins again at the vector that is served worst.
    advance: is told of :data:`RESTARTS` times :data:`ROUNDS` steps.
    """
    random = np.random.default_rng(seed)
    best, most = np.empty((0, 0)), -np.inf
    for _ in range(RESTARTS):
        centroids_ND = _first_centroids(vectors_VD, weights_V, clusters, random)
        nearest_V = np.full(len(vectors_VD), -1)
        for round_number in range(ROUNDS):
            before_V, cosine_VN = nearest_V, vectors_VD @ centroids_ND.T
            nearest_V = cosine_VN.argmax(1)
            if np.array_equal(before_V, nearest_V):
                advance(ROUNDS - round_number)
                break
            centroids_ND = weighted_centroids(vectors_VD, weights_V, nearest_V, centroids_ND)
            advance(1)
        kept = float(weights_V @ (vectors_VD @ centroids_ND.T).max(1))
        if kept > most:
            best, most = centroids_ND, kept
    return best


def weighted_centroids(
    vectors_VD: NDArray[np.float64],
    weights_V: NDArray[np.float64],
    cluster_V: NDArray[np.integer],
    centroids_ND: NDArray[np.float64],
) -> NDArray[np.float64]:
    """float64 [N, D]: the direction of each cluster's weighted sum.

    One that has none takes the direction of a vector that is served worst by ``centroids_ND``.
    """
    shape = (len(centroids_ND), len(weights_V))
    sum_ND = csr_array((weights_V, (cluster_V, np.arange(len(weights_V)))), shape=shape) @ vectors_VD
    empty = np.flatnonzero(~sum_ND.any(1))
    if len(empty):
        missed_V = weights_V * (1 - (vectors_VD @ centroids_ND.T).max(1)) * vectors_VD.any(1)
        worst = np.argsort(-missed_V, kind="stable")[: len(empty)]
        sum_ND[empty[: len(worst)]] = vectors_VD[worst]
    return unit_rows(sum_ND)


def _first_centroids(
    vectors_VD: NDArray[np.float64], weights_V: NDArray[np.float64], clusters: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """Vectors drawn one by one, the likelier the further they are from those drawn before (k-means++)."""
    chosen_ND = np.zeros((clusters, vectors_VD.shape[1]))
    missed_V = weights_V * vectors_VD.any(1)
    for cluster in range(clusters):
        if missed_V.sum() <= 0:  # fewer different vectors than clusters: the others stay empty
            break
        chosen_ND[cluster] = vectors_VD[random.choice(len(missed_V), p=missed_V / missed_V.sum())]
        missed_V = np.minimum(missed_V, weights_V * np.maximum(1 - vectors_VD @ chosen_ND[cluster], 0))
    return chosen_ND
