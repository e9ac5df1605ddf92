"""Which experts each rank holds: so many on every rank, and about as many tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stablemoe_ds.tables.expert_load import relative_load


def order_by_load(load_LN: ArrayLike, ranks: int) -> NDArray[np.int64]:
    """int64 [L, N]: the experts of each layer in the order of their places; rank r has places [r * E, (r + 1) * E).

    The heaviest expert first, each to the rank with the least load of those that have fewer than E = N / ranks experts
    (Graham 1969, longest processing time first, with a limit on the number). On a tie the lower expert and the lower
    rank come first; the experts of a rank stand by number.

    load_LN: numbers [L, N], what each expert serves. ranks: G, which divides N.
    """
    return np.stack([_order_of_layer(load_N, ranks) for load_N in np.asarray(load_LN)])


def _order_of_layer(load_N: NDArray[np.float64], ranks: int) -> NDArray[np.int64]:
    load_G = np.zeros(ranks)
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in np.argsort(-load_N, kind="stable"):
        open_ranks = [rank for rank in range(ranks) if len(held[rank]) < len(load_N) // ranks]
        rank = min(open_ranks, key=lambda rank: load_G[rank])
        held[rank].append(int(expert))
        load_G[rank] += load_N[expert]
    return np.array([sorted(experts) for experts in held], np.int64).reshape(-1)


def rank_loads(load_LN: ArrayLike, order_LN: ArrayLike, ranks: int) -> NDArray[np.float64]:
    """float64 [L, G]: what each rank serves as a multiple of the mean, with experts at these places."""
    placed_LN = np.take_along_axis(np.asarray(load_LN), np.asarray(order_LN), axis=-1)
    return relative_load(placed_LN.reshape(len(placed_LN), ranks, -1).sum(-1))
