"""Balanced assignment of tokens to experts by auction (Bertsekas 1992; BASE layers, Lewis et al. 2021, section 3.1).

Every token bids for the expert that is worth most to it at its price, as much as it would lose with its second choice.
An expert keeps the highest bids it has room for and, once it is full, asks the lowest of them as its price. When no
token is left without an expert, the total affinity is within T * epsilon of the best there is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PATIENCE, LIMIT = 100, 10_000
"""Rounds after which a default epsilon begins to grow, and after which the auction gives up."""


@torch.no_grad()
def balanced_assignment(scores_TN: Tensor, epsilon: float | None = None) -> Tensor:
    """int64 [T]: an expert for each token, none with more than ceil(T / N) tokens.

    scores_TN: fp32 [T, N], finite. epsilon: least raise of a bid, above 0; None: a fiftieth of the range of the scores,
    at least 1e-4, doubled after every ``PATIENCE`` rounds. Raises RuntimeError for scores that are not finite, and if
    the auction has not ended after ``LIMIT`` rounds. Waits for the device in every round.
    """
    tokens, experts = scores_TN.shape
    expert_T = torch.full((tokens,), -1, dtype=torch.int64, device=scores_TN.device)
    if tokens == 0 or experts == 1:
        return expert_T.clamp_min(0)
    lowest, highest = (float(bound) for bound in torch.aminmax(scores_TN))
    if not math.isfinite(highest - lowest):
        raise RuntimeError("affinities hold NaN or infinity: tokens cannot be assigned")
    raise_by = max((highest - lowest) / 50, 1e-4) if epsilon is None else epsilon
    room = -(-tokens // experts)
    bid_T = torch.zeros(tokens, device=scores_TN.device)
    price_N = torch.zeros(experts, device=scores_TN.device)
    for rounds in range(1, LIMIT + 1):
        waiting = (expert_T < 0).nonzero()[:, 0]
        if not len(waiting):
            return expert_T
        value, best = (scores_TN[waiting] - price_N).topk(2, dim=1)
        expert_T[waiting] = best[:, 0]
        bid_T[waiting] = price_N[best[:, 0]] + value[:, 0] - value[:, 1] + raise_by
        _keep_highest(expert_T, bid_T, price_N, room)
        if epsilon is None and rounds % PATIENCE == 0:
            raise_by *= 2
    raise RuntimeError(f"balanced assignment of {tokens} tokens to {experts} experts did not end in {LIMIT} rounds")


def _keep_highest(expert_T: Tensor, bid_T: Tensor, price_N: Tensor, room: int) -> None:
    """Each expert lets go of all but its ``room`` highest bids; a full one asks the lowest it keeps. In place."""
    # One sort instead of two: bids, brought below 1, order the tokens within an expert; float64 keeps them apart.
    order = (expert_T.double() - bid_T.double() / (1 + bid_T.max())).argsort(stable=True)
    counts_N = torch.bincount(expert_T, minlength=len(price_N))
    start_N = counts_N.cumsum(0) - counts_N
    place = torch.arange(len(order), device=order.device) - start_N[expert_T[order]]
    lowest_kept = order[place == room - 1]
    price_N[expert_T[lowest_kept]] = bid_T[lowest_kept]
    expert_T[order[place >= room]] = -1
