"""The two losses that teach a router, as plain functions of tensors (paper eq. 8 and 9-10)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stablemoe_ds.routing.routes import SumOverRanks


def count_tokens(expert_TK: Tensor, experts: int) -> Tensor:
    """int64 [N]: how many (token, choice) pairs name each expert; negative entries are not counted."""
    flat = expert_TK.reshape(-1)
    # One extra bin takes what is not routed. A boolean index or bincount would wait for the device to learn a length.
    bins = torch.where(flat < 0, experts, flat)
    return flat.new_zeros(experts + 1).scatter_add_(0, bins, torch.ones_like(flat))[:experts]


def balance_sum(expert_TK: Tensor, gate_TK: Tensor, counts_N: Tensor, sum_over_ranks: SumOverRanks) -> Tensor:
    """This rank's share of the balance loss, unweighted and not yet divided by the token count (paper eq. 8).

    The sum over this rank's tokens of (n_a - nbar)/nbar * gate, where n_i counts expert i over *all* ranks and
    nbar is its mean; both are constants under the gradient.

    expert_TK: int64 [T, K], negative where not routed. gate_TK: fp32 [T, K], sigmoid of the chosen affinity.
    counts_N: int64 [N], this rank's counts of ``expert_TK``. Returns a scalar; zero if no rank has a token.
    """
    with torch.no_grad():
        total_N = sum_over_ranks(counts_N.float())
        mean = total_N.mean().clamp_min(torch.finfo(torch.float32).tiny)
        excess_N = (total_N - mean) / mean
        routed_TK = expert_TK >= 0
        excess_TK = excess_N[expert_TK.clamp_min(0)] * routed_TK
    return (excess_TK * gate_TK).sum()


def distillation_sum(logits_TN: Tensor, expert_TK: Tensor) -> Tensor:
    """Cross entropy of the distilled router against the experts the tokens were sent to (paper eq. 9-10).

    logits_TN: fp32 [T, N]. expert_TK: int64 [T, K], constant targets; with K > 1 the mean over the K targets.
    Returns the sum over routed tokens, a scalar.
    """
    log_p_TN = F.log_softmax(logits_TN, dim=-1)
    routed_TK = expert_TK >= 0
    picked_TK = log_p_TN.gather(1, expert_TK.clamp_min(0)) * routed_TK
    return -picked_TK.sum() / expert_TK.shape[1]
