"""StableMoE's router: learned on hidden states in stage 1, followed from known routes in stage 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablemoe_ds.routing.distilled import DistilledRouter, Fp32Module
from stablemoe_ds.routing.losses import balance_sum, count_tokens, distillation_sum
from stablemoe_ds.routing.routes import NOT_ROUTED, Routes, SumOverRanks, TokenView


def best_experts(scores: Tensor, top_k: int) -> Tensor:
    """Indices [..., K] of the K best of [..., N]; on a tie the lowest index, on every device."""
    if top_k == 1:
        return scores.argmax(-1, keepdim=True)  # torch documents: the first of equal maxima
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


class StableMoERouter(Fp32Module):
    """Centroid affinity on the residual stream, sigmoid gate, balance and distillation losses (paper eq. 6-10).

    All arithmetic is fp32. The same object serves both stages: with ``fixed_TK`` the choice is given, only the
    gate is computed, and there are no auxiliary losses.
    """

    def __init__(self, hidden_size: int, experts: int, top_k: int, distilled: DistilledRouter, normalize: bool) -> None:
        super().__init__()
        self.experts, self.top_k, self.normalize = experts, top_k, normalize
        self.centroids = nn.Parameter(torch.empty(experts, hidden_size))
        self.distilled = distilled

    def affinity(self, hidden_TD: Tensor) -> Tensor:
        """fp32 [T, N]: <E_i, h_t>; with ``normalize``, of h_t at unit root mean square."""
        with torch.autocast(hidden_TD.device.type, enabled=False):
            hidden_TD = hidden_TD.float()
            if self.normalize:
                hidden_TD = F.rms_norm(hidden_TD, hidden_TD.shape[-1:], eps=1e-6)
            return F.linear(hidden_TD, self.centroids)

    def forward(
        self, hidden_TD: Tensor, tokens: TokenView, fixed_TK: Tensor | None, sum_over_ranks: SumOverRanks
    ) -> Routes:
        """Route T tokens.

        hidden_TD: [T, D], residual stream. fixed_TK: int64 [T, K] of stage 2, or None in stage 1.
        The auxiliary losses are computed in training only; in evaluation only the agreement is.
        """
        scores_TN = self.affinity(hidden_TD)
        learned = fixed_TK is None
        chosen_TK = best_experts(scores_TN.detach(), self.top_k) if fixed_TK is None else fixed_TK
        expert_TK = torch.where(tokens.real_T[:, None], chosen_TK, NOT_ROUTED)
        gate_TK = torch.sigmoid(scores_TN.gather(1, chosen_TK.clamp_min(0)))
        counts_N = count_tokens(expert_TK, self.experts)
        if not learned:
            return Routes(expert_TK, gate_TK, {}, counts_N)

        logits_TN = self.distilled(tokens.ids_BS).transpose(0, 1).flatten(0, 1)
        losses: dict[str, Tensor] = {}
        if self.training:
            losses["balance"] = balance_sum(expert_TK, gate_TK, counts_N, sum_over_ranks)
            losses["distill"] = distillation_sum(logits_TN, expert_TK)
        return Routes(expert_TK, gate_TK, losses, counts_N, self._agreement(logits_TN, chosen_TK, tokens.real_T))

    @torch.no_grad()
    def _agreement(self, logits_TN: Tensor, chosen_TK: Tensor, real_T: Tensor) -> Tensor:
        """Real tokens for which the distilled router names the same set of experts."""
        named_TK = best_experts(logits_TN, self.top_k)
        same_T = (named_TK.sort(-1).values == chosen_TK.sort(-1).values).all(-1)
        return (same_T & real_T).sum()
