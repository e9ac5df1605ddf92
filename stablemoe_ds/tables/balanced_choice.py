"""A table that keeps as much affinity as a load limit allows: balanced once, when it is frozen.

Token counts are known, so the load of a table is known before a token is routed. What the best choice of each id
leaves uneven can be put right where it costs least. This is the generalized assignment problem: NP-hard, as a heavy
id cannot be split, but easy as soon as only light ids are left.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.progress_bar import Advance, unwatched

ROUNDS, MORE_ROUNDS = 300, 100
"""Subgradient steps to the first prices, and from prices to those of fewer ids."""
EXCHANGED, PASSES = 1000, 5
"""How many of the heaviest ids may change places in the end, and how often each is asked."""


def balanced_choice(
    scores_VN: NDArray[np.float64], token_counts: NDArray[np.int64], max_load: float
) -> NDArray[np.int32]:
    """int32 [V]: an expert for each id, with close to the largest sum over ids of count * score under the limit.

    scores_VN: [V, N]. token_counts: int64 [V]. max_load: tokens an expert may have, as a multiple of the mean; an id
    that fits nowhere goes to the emptiest expert. Ids are placed the heaviest first, each where it is worth most, at
    the experts' prices, of what still has room. Prices are found again for the ids that are left whenever as many have
    been placed again. At last the heaviest ids change places where that gains. Ids that do not occur keep their best
    expert: they weigh nothing.
    """
    return balanced_choices(scores_VN, token_counts, max_load, 1)[:, 0]


def balanced_choices(
    scores_VN: NDArray[np.float64],
    token_counts: NDArray[np.int64],
    max_load: float,
    top_k: int,
    advance: Advance = unwatched,
) -> NDArray[np.int32]:
    """int32 [V, K]: ``top_k`` different experts for each id, chosen one after the other.

    As :func:`balanced_choice`, for the first choice of all ids, then for the second, and so on; after c choices an
    expert may have ``max_load`` times the mean of c tokens for each one of the text. advance: is told of
    :func:`steps_of_choice` steps for each choice.
    """
    open_VN = scores_VN.astype(np.float64)
    load_N = np.zeros(scores_VN.shape[1])
    choice_VK = np.empty((len(scores_VN), top_k), dtype=np.int32)
    for choice in range(top_k):
        room = (choice + 1) * max_load * token_counts.sum() / len(load_N)
        choice_VK[:, choice] = next_choice(open_VN, token_counts, load_N, room, advance)
        open_VN[np.arange(len(open_VN)), choice_VK[:, choice]] = -np.inf
    return choice_VK


def steps_of_choice(token_counts: NDArray[np.int64]) -> int:
    """Rounds in which the prices for one choice of all ids are found: most of the work."""
    occurring = int(np.count_nonzero(token_counts))
    return ROUNDS + MORE_ROUNDS * (occurring - 1).bit_length() if occurring else 0


def next_choice(
    scores_VN: NDArray[np.float64],
    token_counts: NDArray[np.int64],
    load_N: NDArray[np.float64],
    room: float,
    advance: Advance = unwatched,
) -> NDArray[np.int32]:
    """int32 [V]: one more expert for each id, as :func:`balanced_choice`, none whose score is minus infinity.

    load_N: float64 [N], tokens the experts have; changes with the choice. room: tokens they may have. advance: is told
    of :func:`steps_of_choice` steps.
    """
    choice_V = scores_VN.argmax(1).astype(np.int32)
    occurring = np.flatnonzero(token_counts)
    heaviest_first = occurring[np.argsort(-token_counts[occurring], kind="stable")]
    spread = float(np.ptp(scores_VN[np.isfinite(scores_VN)])) if scores_VN.size else 0.0
    price_N = np.zeros(len(load_N))
    placed = 0
    while placed < len(heaviest_first):
        left = heaviest_first[placed:]
        step, rounds = (spread / 100, MORE_ROUNDS) if placed else (spread / 10, ROUNDS)
        price_N = _prices(scores_VN[left], token_counts[left], room - load_N, price_N, step, rounds, advance)
        for index in left[: max(1, placed)]:
            count = token_counts[index]
            fits_N = load_N + count <= room
            value_N = np.where(fits_N, scores_VN[index] - price_N, -np.inf)
            if np.isneginf(value_N.max()):
                value_N = np.where(np.isneginf(scores_VN[index]), -np.inf, -load_N)
            expert = value_N.argmax()
            choice_V[index] = expert
            load_N[expert] += count
        placed += max(1, placed)
    heavy = heaviest_first[:EXCHANGED]
    choice_V[heavy] = _exchanged(scores_VN[heavy], token_counts[heavy], choice_V[heavy], load_N, room)
    return choice_V


def _prices(
    scores_VN: NDArray[np.float64],
    counts_V: NDArray[np.int64],
    room_N: NDArray[np.float64],
    price_N: NDArray[np.float64],
    step: float,
    rounds: int,
    advance: Advance,
) -> NDArray[np.float64]:
    """float64 [N]: what a token of each expert has to cost for the best choices to stay within ``room_N``.

    Subgradient steps on the dual of the linear relaxation from ``price_N`` on, the first one of size ``step``.
    """
    experts = len(price_N)
    kept_N = np.zeros(experts)
    unit = max(room_N.mean(), 1.0)
    for round_number in range(rounds):
        load_N = np.bincount((scores_VN - price_N).argmax(1), weights=counts_V, minlength=experts)
        excess_N = np.clip((load_N - room_N) / unit, -1, 1)
        price_N = np.maximum(price_N + step / np.sqrt(1 + round_number) * excess_N, 0)
        if round_number >= rounds // 2:  # the mean of the later iterates is steadier than the last
            kept_N += price_N / (rounds - rounds // 2)
        advance(1)
    return kept_N


def _exchanged(
    scores_VN: NDArray[np.float64],
    counts_V: NDArray[np.int64],
    choice_V: NDArray[np.int32],
    load_N: NDArray[np.float64],
    room: float,
) -> NDArray[np.int32]:
    """``choice_V`` after each id has moved, or changed places with another, where that gains most and has room.

    load_N: load by ``choice_V`` and by all other ids; changes with it.
    """
    experts, every = len(load_N), np.arange(len(counts_V))
    for _ in range(PASSES):
        before_V = choice_V
        choice_V = choice_V.copy()
        for one, count in enumerate(counts_V):
            here = choice_V[one]
            worth_N = count * (scores_VN[one] - scores_VN[one, here])
            moved_N = np.where(load_N + count <= room, worth_N, 0)
            more_V = count - counts_V  # what the other's expert would have to take on, and this one to give
            fits_V = (load_N[choice_V] + more_V <= room) & (load_N[here] - more_V <= room)
            swapped_V = worth_N[choice_V] + counts_V * (scores_VN[:, here] - scores_VN[every, choice_V])
            gain = np.concatenate([moved_N, np.where(fits_V, swapped_V, 0)])
            best = int(gain.argmax())
            if gain[best] <= 0:
                continue
            there, more = (best, count) if best < experts else (choice_V[best - experts], more_V[best - experts])
            if best >= experts:
                choice_V[best - experts] = here
            choice_V[one] = there
            load_N[there] += more
            load_N[here] -= more
        if np.array_equal(before_V, choice_V):
            break
    return choice_V
