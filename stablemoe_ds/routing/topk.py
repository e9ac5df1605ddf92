"""Best-k routing balanced by a bias instead of a loss (DeepSeek-V3 technical report, section 2.1.2)."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.routing.distilled import DistilledRouter
from stablemoe_ds.routing.gates import Gate
from stablemoe_ds.routing.router import CentroidRouter, best_experts
from stablemoe_ds.routing.routes import Routes, SumOverRanks, TokenView

TINY = 1e-20
"""Added to the sum that gates are divided by, as in DeepSeek's own code; too small to change one that is not 0."""


class TopKRouter(CentroidRouter):
    """Sigmoid affinity; a bias joins it in the choice but not in the gate, and follows the load.

    With several experts a token their gates are divided by their sum; a single gate is left as it is, for it would be
    1 whatever the affinity.
    """

    bias_N: Tensor  # noqa: N815

    def __init__(
        self,
        hidden_size: int,
        experts: int,
        top_k: int,
        normalize: bool,
        distilled: DistilledRouter | None = None,
        gate: Gate | None = None,
        bias_step: float = 0.001,
    ) -> None:
        """``bias_step``: how far one update moves a bias."""
        super().__init__(hidden_size, experts, top_k, normalize, distilled, gate)
        self.bias_step = bias_step
        self.register_buffer("bias_N", torch.zeros(experts))

    @classmethod
    def from_config(cls, moe: MoEConfig, hidden_size: int, distilled: DistilledRouter | None) -> Self:
        router = super().from_config(moe, hidden_size, distilled)
        router.bias_step = moe.bias_step
        return router

    def forward(
        self, hidden_TD: Tensor, tokens: TokenView, fixed_TK: Tensor | None, sum_over_ranks: SumOverRanks
    ) -> Routes:
        scores_TN = self.affinity(hidden_TD)
        weight_TN = torch.sigmoid(scores_TN)
        if fixed_TK is None:
            fixed_TK = best_experts(weight_TN.detach() + self.bias_N, self.top_k)
        at_TK = fixed_TK.clamp_min(0)
        if self.top_k > 1:
            # Where every chosen sigmoid underflows a quotient of two zeros would end the run.
            weight_TN = weight_TN / (weight_TN.gather(1, at_TK).sum(1, keepdim=True) + TINY)
        return self.route(fixed_TK, scores_TN.gather(1, at_TK), weight_TN.gather(1, at_TK), tokens)

    @torch.no_grad()
    def after_update(self, counts_N: Tensor, statistic_N: Tensor | None) -> None:
        self.bias_N += self.bias_step * torch.sign(counts_N.mean() - counts_N)
