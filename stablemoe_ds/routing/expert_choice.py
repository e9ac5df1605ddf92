"""Experts choose tokens (Zhou et al. 2022, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from stablemoe_ds.routing.distilled import DistilledRouter
from stablemoe_ds.routing.gates import Gate
from stablemoe_ds.routing.router import CentroidRouter
from stablemoe_ds.routing.routes import NOT_ROUTED, Routes, SumOverRanks, TokenView

MEMORY = 0.9
"""Share of a threshold that an update keeps (a moving average)."""


class ExpertChoiceRouter(CentroidRouter):
    """Each expert takes the T * k / N tokens of the rank's micro-batch that give it the largest softmax share.

    A token has as many experts as take it, perhaps none, and the load is even by construction. To choose among a batch
    is to look at later tokens, which a language model in use cannot do: in evaluation an expert takes the tokens above
    a threshold instead, which follows the share of the last token it took in training. The choice depends on the
    micro-batch, and so on the layout.
    """

    threshold_N: Tensor  # noqa: N815

    def __init__(
        self,
        hidden_size: int,
        experts: int,
        top_k: int,
        normalize: bool,
        distilled: DistilledRouter | None = None,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(hidden_size, experts, top_k, normalize, distilled, gate)
        self.register_buffer("threshold_N", torch.full((experts,), 1 / experts))

    def forward(
        self, hidden_TD: Tensor, tokens: TokenView, fixed_TK: Tensor | None, sum_over_ranks: SumOverRanks
    ) -> Routes:
        scores_TN = self.affinity(hidden_TD)
        share_TN = torch.softmax(scores_TN, dim=-1)
        if fixed_TK is not None:
            at_TK = fixed_TK.clamp_min(0)
            return self.route(fixed_TK, scores_TN.gather(1, at_TK), share_TN.gather(1, at_TK), tokens)
        seen_TN = share_TN.detach().masked_fill(~tokens.real_T[:, None], -1.0)
        threshold_N = self.threshold_N
        if self.training:
            takes = math.ceil(int(tokens.real_T.sum()) * self.top_k / self.experts)
            taken = seen_TN.topk(max(takes, 1), dim=0)
            chosen_TN = torch.zeros_like(seen_TN, dtype=torch.bool).scatter(0, taken.indices, True)
            # Without a real token nothing is taken, and there is nothing to learn from it.
            threshold_N = torch.where(taken.values[-1] >= 0, taken.values[-1], threshold_N)
        else:
            chosen_TN = seen_TN >= threshold_N
        # As many columns as the most wanted token has experts; the others are empty. Costs a wait for the device.
        width = max(1, int(chosen_TN.sum(1).max())) if chosen_TN.numel() else 1
        best_TK = torch.where(chosen_TN, seen_TN, -1.0).topk(width, dim=1)
        expert_TK = torch.where(best_TK.values >= 0, best_TK.indices, NOT_ROUTED)
        affinity_TK, share_TK = scores_TN.gather(1, best_TK.indices), share_TN.gather(1, best_TK.indices)
        return replace(self.route(expert_TK, affinity_TK, share_TK, tokens), statistic_N=threshold_N)

    @torch.no_grad()
    def after_update(self, counts_N: Tensor, statistic_N: Tensor | None) -> None:
        if statistic_N is not None:
            self.threshold_N.lerp_(statistic_N, 1 - MEMORY)
