"""Vectors of ids from the company they keep: ids with like neighbours lie near each other.

Positive pointwise mutual information and its truncated singular value decomposition, as Levy, Goldberg and Dagan
(2015, "Improving Distributional Similarity with Lessons Learned from Word Embeddings") compare them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, svds

from stablemoe_ds.config.table_options import VectorOptions
from stablemoe_ds.progress_bar import Advance, progress_bar
from stablemoe_ds.tables.neighbours import pairs_by_row

NOTHING = 1e-9
"""Singular values below this part of the largest are rounding."""


def id_vectors(followers_VV: csr_array, options: VectorOptions, seed: int) -> NDArray[np.float64]:
    """float64 [V, D], D <= ``options.dims``: unit vectors; zero for an id without neighbours.

    followers_VV: [V, V], how often the column's id follows the row's (:func:`count_followers`). Besides it, memory is
    taken for one number for each of its pairs: weights of left neighbours are those of right ones transposed.
    """
    counts = followers_VV + followers_VV.T if options.sides == "joined" else followers_VV
    weighed = positive_pmi(counts) if options.weighting == "ppmi" else counts.log1p()
    parts = {"left": [weighed.T], "both": [weighed.T, weighed]}.get(options.sides, [weighed])
    return unit_rows(_left_singular(parts, options.dims, options.power, seed))


def positive_pmi(counts: csr_array) -> csr_array:
    """max(0, log(count * total / (row * column))) of each pair: nats."""
    rows, columns, total = counts.sum(1), counts.sum(0), counts.sum()
    weights = np.empty(counts.nnz)
    for pairs, row in pairs_by_row(counts):
        weight = counts.data[pairs] * (total / rows[row])
        weight /= columns[counts.indices[pairs]]
        weights[pairs] = np.maximum(np.log(weight), 0)
    return csr_array((weights, counts.indices, counts.indptr), shape=counts.shape)


def unit_rows(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row at length 1, zero where it is zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)


def _left_singular(parts: Sequence[Any], dims: int, power: float, seed: int) -> NDArray[np.float64]:
    """The first left singular vectors of sparse matrices [V, V] side by side, times their singular values to a power.

    Largest first. The start vector comes from the seed and the largest entry of each vector is positive, so that the
    answer does not depend on the state of the library.
    """
    vocab = parts[0].shape[0]
    if not any(part.count_nonzero() for part in parts):
        return np.zeros((vocab, 1))
    if dims >= vocab // 2:  # the iteration finds fewer than all of them, and the matrix is small
        left, values, _ = np.linalg.svd(np.hstack([part.toarray() for part in parts]), full_matrices=False)
    else:
        start = np.random.default_rng(seed).standard_normal(vocab)
        with progress_bar("vectors", None) as advance:
            both = _side_by_side(parts, advance)
            left, values, _ = svds(both, k=dims, v0=start, return_singular_vectors="u")
        left, values = left[:, ::-1], values[::-1]
    kept = min(dims, int((values > NOTHING * values[0]).sum()))
    left, values = left[:, :kept], values[:kept]
    largest = left[np.abs(left).argmax(0), np.arange(kept)]
    return np.asarray(left * np.sign(largest) * values**power)


def _side_by_side(parts: Sequence[Any], advance: Advance) -> LinearOperator:
    """Sparse matrices next to each other, which are never copied into one. advance: is told of each product."""

    def times(right: NDArray[np.float64]) -> NDArray[np.float64]:
        advance(1)
        return sum(part @ piece for part, piece in zip(parts, np.split(right, len(parts)), strict=True))

    def transposed_times(right: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([part.T @ right for part in parts])

    vocab = parts[0].shape[0]
    products = {"matvec": times, "matmat": times, "rmatvec": transposed_times, "rmatmat": transposed_times}
    return LinearOperator((vocab, vocab * len(parts)), dtype=np.float64, **products)
