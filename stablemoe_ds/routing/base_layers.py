"""The router of BASE layers (Lewis et al. 2021): balanced by assignment, not by a loss."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stablemoe_ds.routing.auction import balanced_assignment
from stablemoe_ds.routing.router import CentroidRouter, best_experts
from stablemoe_ds.routing.routes import Routes, SumOverRanks, TokenView


class BaseLayersRouter(CentroidRouter):
    """In training each rank's tokens are assigned so that all experts have as many; in evaluation greedily.

    The gate is the sigmoid of the affinity. With a distilled router it is the paper's "BASE + fixed routing": what is
    imitated is the expert a token was really sent to. The assignment depends on what else is in the micro-batch, and
    so on the layout. It gives a token one expert, whatever ``top_k``.
    """

    def forward(
        self, hidden_TD: Tensor, tokens: TokenView, fixed_TK: Tensor | None, sum_over_ranks: SumOverRanks
    ) -> Routes:
        if fixed_TK is not None:
            return self.follow(hidden_TD, fixed_TK, tokens)
        scores_TN = self.affinity(hidden_TD)
        seen_TN = scores_TN.detach()
        if self.training:
            chosen_TK = torch.zeros_like(tokens.real_T, dtype=torch.int64)
            # A model that has diverged shows in its loss, on all ranks at once; an auction must not end one of them.
            finite_TN = seen_TN[tokens.real_T].nan_to_num(0.0, 0.0, 0.0)
            chosen_TK[tokens.real_T] = balanced_assignment(finite_TN)
            chosen_TK = chosen_TK[:, None]
        else:
            chosen_TK = best_experts(seen_TN, 1)
        affinity_TK = scores_TN.gather(1, chosen_TK)
        routes = self.route(chosen_TK, affinity_TK, torch.sigmoid(affinity_TK), tokens)
        losses, agree = self.imitated(tokens, routes.expert_TK)
        return replace(routes, loss_sums=losses, agree=agree)
