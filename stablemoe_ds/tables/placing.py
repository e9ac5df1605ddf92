"""Placing ids on experts one after the other, where no more than their counts has to be known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.progress_bar import Advance, unwatched


def greedy_choices(
    scores_VN: NDArray[np.float64],
    counts_V: NDArray[np.int64],
    max_load: float,
    top_k: int,
    advance: Advance = unwatched,
) -> NDArray[np.int32]:
    """int32 [V, K]: the commonest ids first, each to its ``top_k`` best experts with room, else to the emptiest.

    scores_VN: [V, N]. max_load: as in :func:`balanced_choice`. Rows of ids that do not occur have no meaning.
    advance: is told of each id that occurs.
    """
    load_N = np.zeros(scores_VN.shape[1])
    room = max_load * top_k * counts_V.sum() / len(load_N)
    choice_VK = np.zeros((len(scores_VN), top_k), dtype=np.int32)
    for index in heaviest_first(counts_V):
        full_N = load_N + counts_V[index] > room
        chosen = np.lexsort((-scores_VN[index], np.where(full_N, load_N, 0)))[:top_k]
        choice_VK[index] = chosen
        load_N[chosen] += counts_V[index]
        advance(1)
    return choice_VK


def heaviest_first(counts_V: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ids that occur, by falling count; of equal counts the lower id first."""
    occurring = np.flatnonzero(counts_V)
    return occurring[np.argsort(-counts_V[occurring], kind="stable")]


def deal_absent(choice_VK: NDArray[np.int32], counts_V: NDArray[np.int64], experts: int, seed: list[int]) -> None:
    """Give ids that do not occur, of which nothing is known, to all experts in turn, in random order; in place."""
    absent = np.flatnonzero(counts_V == 0)
    top_k = choice_VK.shape[1]
    turn = np.random.default_rng(seed).permutation(len(absent))[:, None] * top_k + np.arange(top_k)
    choice_VK[absent] = turn % experts
