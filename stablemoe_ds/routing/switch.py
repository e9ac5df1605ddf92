"""The Switch Transformer's router (Fedus, Zoph and Shazeer 2021, section 2)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stablemoe_ds.routing.router import CentroidRouter, best_experts
from stablemoe_ds.routing.routes import Routes, SumOverRanks, TokenView


class SwitchRouter(CentroidRouter):
    """Largest of a softmax over all experts, which is the gate as well; loss N * sum_i f_i P_i (their eq. 4-6)."""

    def forward(
        self, hidden_TD: Tensor, tokens: TokenView, fixed_TK: Tensor | None, sum_over_ranks: SumOverRanks
    ) -> Routes:
        scores_TN = self.affinity(hidden_TD)
        share_TN = torch.softmax(scores_TN, dim=-1)
        chosen_TK = best_experts(share_TN.detach(), self.top_k) if fixed_TK is None else fixed_TK
        at_TK = chosen_TK.clamp_min(0)
        routes = self.route(chosen_TK, scores_TN.gather(1, at_TK), share_TN.gather(1, at_TK), tokens)
        if not self.training or fixed_TK is not None:
            return routes
        return replace(
            routes, loss_sums={"balance": switch_sum(share_TN, tokens.real_T, routes.counts_N, sum_over_ranks)}
        )


def switch_sum(share_TN: Tensor, real_T: Tensor, counts_N: Tensor, sum_over_ranks: SumOverRanks) -> Tensor:
    """This rank's share of N * sum_i f_i P_i, not yet divided by the token count.

    f_i, the share of all ranks' tokens sent to expert i, is a constant; P_i is the mean of the softmax over real
    tokens. share_TN: fp32 [T, N]. counts_N: int64 [N], tokens of this rank by expert. Returns a scalar.
    """
    with torch.no_grad():
        total_N = sum_over_ranks(counts_N.float())
        f_N = total_N / total_N.sum().clamp_min(1)
    return share_TN.shape[1] * (share_TN * real_T[:, None] @ f_N).sum()
