"""Hash layers (Roller et al. 2021): a table of ids that nobody learned."""

from __future__ import annotations

import torch
from torch import Tensor

from stablemoe_ds.routing.losses import count_tokens
from stablemoe_ds.routing.router import Router
from stablemoe_ds.routing.routes import NOT_ROUTED, Routes, SumOverRanks, TokenView


class HashRouter(Router):
    """Follows given routes with a gate of 1; it has nothing to learn."""

    def forward(
        self, hidden_TD: Tensor, tokens: TokenView, fixed_TK: Tensor | None, sum_over_ranks: SumOverRanks
    ) -> Routes:
        """As in :class:`Router`; raises ValueError without ``fixed_TK``."""
        if fixed_TK is None:
            raise ValueError("router hash decides nothing by itself: pass the routes of its table")
        expert_TK = torch.where(tokens.real_T[:, None], fixed_TK, NOT_ROUTED)
        gate_TK = torch.ones(expert_TK.shape, device=hidden_TD.device)
        return Routes(expert_TK, gate_TK, {}, count_tokens(expert_TK, self.experts))
