"""Vectors of ids from the company they keep: ids with like neighbours lie near each other.

Positive pointwise mutual information and its truncated singular value decomposition, as Levy, Goldberg and Dagan
(2015, "Improving Distributional Similarity with Lessons Learned from Word Embeddings") compare them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, hstack
from scipy.sparse.linalg import svds

from stablemoe_ds.config.table_options import VectorOptions

NOTHING = 1e-9
"""Singular values below this part of the largest are rounding."""


def id_vectors(followers_VV: csr_array, options: VectorOptions, seed: int) -> NDArray[np.float64]:
    """float64 [V, D], D <= ``options.dims``: unit vectors; zero for an id without neighbours.

    followers_VV: [V, V], how often the column's id follows the row's (:func:`count_followers`).
    """
    weigh = positive_pmi if options.weighting == "ppmi" else _log_counts
    preceders_VV = followers_VV.T.tocsr()
    match options.sides:
        case "right":
            seen = weigh(followers_VV)
        case "left":
            seen = weigh(preceders_VV)
        case "joined":
            seen = weigh(followers_VV + preceders_VV)
        case _:
            seen = csr_array(hstack([weigh(preceders_VV), weigh(followers_VV)]))
    return unit_rows(_left_singular(seen, options.dims, options.power, seed))


def positive_pmi(counts: csr_array) -> csr_array:
    """max(0, log(count * total / (row * column))) of each pair: nats."""
    rows, columns = counts.sum(1), counts.sum(0)
    pairs = counts.tocoo()
    pmi = np.log(pairs.data * (counts.sum() / rows[pairs.coords[0]]) / columns[pairs.coords[1]])
    weighed = csr_array((np.maximum(pmi, 0), pairs.coords), shape=counts.shape)
    weighed.eliminate_zeros()
    return weighed


def unit_rows(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row at length 1, zero where it is zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)


def _log_counts(counts: csr_array) -> csr_array:
    return counts.log1p()


def _left_singular(matrix: csr_array, dims: int, power: float, seed: int) -> NDArray[np.float64]:
    """The first left singular vectors times their singular values to a power, largest first.

    The start vector comes from the seed and the largest entry of each vector is positive, so that the answer does not
    depend on the state of the library.
    """
    smaller = min(matrix.shape)
    if matrix.nnz == 0:
        return np.zeros((matrix.shape[0], 1))
    if dims >= smaller // 2:  # the iteration finds fewer than all of them, and the matrix is small
        left, values, _ = np.linalg.svd(matrix.toarray(), full_matrices=False)
    else:
        start = np.random.default_rng(seed).standard_normal(smaller)
        left, values, _ = svds(matrix, k=dims, v0=start, return_singular_vectors="u")
        left, values = left[:, ::-1], values[::-1]
    kept = min(dims, int((values > NOTHING * values[0]).sum()))
    left, values = left[:, :kept], values[:kept]
    largest = left[np.abs(left).argmax(0), np.arange(kept)]
    return np.asarray(left * np.sign(largest) * values**power)
