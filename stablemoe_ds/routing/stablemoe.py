"""StableMoE's router: learned on hidden states in stage 1, followed from known routes in stage 2."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stablemoe_ds.routing.losses import balance_sum
from stablemoe_ds.routing.router import CentroidRouter, best_experts
from stablemoe_ds.routing.routes import Routes, SumOverRanks, TokenView


class StableMoERouter(CentroidRouter):
    """Best affinity, sigmoid gate, balance and distillation losses (paper eq. 6-10), eq. 8 also with another gate.

    The same object serves both stages: in stage 2 the choice is given and only the gate is computed. Without a
    distilled router it is the paper's ablation that stays in stage 1.
    """

    def forward(
        self, hidden_TD: Tensor, tokens: TokenView, fixed_TK: Tensor | None, sum_over_ranks: SumOverRanks
    ) -> Routes:
        if fixed_TK is not None:
            return self.follow(hidden_TD, fixed_TK, tokens)
        scores_TN = self.affinity(hidden_TD)
        chosen_TK = best_experts(scores_TN.detach(), self.top_k)
        affinity_TK = scores_TN.gather(1, chosen_TK)
        sigma_TK = torch.sigmoid(affinity_TK)
        routes = self.route(chosen_TK, affinity_TK, sigma_TK, tokens)
        losses, agree = self.imitated(tokens, routes.expert_TK)
        if self.training:
            losses["balance"] = balance_sum(routes.expert_TK, sigma_TK, routes.counts_N, sum_over_ranks)
        return replace(routes, loss_sums=losses, agree=agree)
