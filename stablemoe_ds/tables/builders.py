"""Tables that nobody learned, from counts of ids or from nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def random_table(vocab: int, experts: int, top_k: int, layers: int, seed: int) -> NDArray[np.int32]:
    """int32 [L, V, K]: different experts drawn uniformly for each id, anew in each layer."""
    draw = np.random.default_rng(seed).random((layers, vocab, experts))
    return np.ascontiguousarray(draw.argsort(-1, kind="stable")[..., :top_k], dtype=np.int32)


def even_table(token_counts: NDArray[np.int64], experts: int, top_k: int, layers: int, seed: int) -> NDArray[np.int32]:
    """int32 [L, V, K]: the heaviest id first, each to the experts with the fewest tokens so far.

    token_counts: int64 [V]. Ids of equal count come in random order, and so do experts of equal load.
    """
    random = np.random.default_rng(seed)
    table_LVK = np.empty((layers, len(token_counts), top_k), dtype=np.int32)
    for layer in range(layers):
        load_N = random.random(experts) * 1e-6
        for index in np.lexsort((random.random(len(token_counts)), -token_counts)):
            emptiest = np.argsort(load_N, kind="stable")[:top_k]
            table_LVK[layer, index] = emptiest
            # Ids that do not occur are spread as well: they weigh a little.
            load_N[emptiest] += max(int(token_counts[index]), 1e-3)
    return table_LVK
