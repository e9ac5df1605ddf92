"""What all routers have in common: the interface an MoE layer calls, and centroids to choose and gate by."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.routing.chosen import chosen_affinity
from stablemoe_ds.routing.distilled import DistilledRouter, Fp32Module
from stablemoe_ds.routing.gates import Gate, make_gate
from stablemoe_ds.routing.losses import count_tokens, distillation_sum
from stablemoe_ds.routing.routes import NOT_ROUTED, Routes, SumOverRanks, TokenView


def best_experts(scores: Tensor, top_k: int) -> Tensor:
    """Indices [..., K] of the K best of [..., N]; on a tie the lowest index, on every device."""
    if top_k == 1:
        return scores.argmax(-1, keepdim=True)  # torch documents: the first of equal maxima
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


class Router(Fp32Module):
    """Decides which experts serve a token, and with what weight. All arithmetic is fp32.

    Buffers of a router are its state besides the parameters; checkpoints keep them.
    """

    def __init__(self, experts: int, top_k: int, distilled: DistilledRouter | None = None) -> None:
        """``distilled``: router of token ids that learns to imitate this one, if there is to be a stage 2."""
        super().__init__()
        self.experts, self.top_k, self.distilled = experts, top_k, distilled

    @classmethod
    def from_config(cls, moe: MoEConfig, hidden_size: int, distilled: DistilledRouter | None) -> Self:
        """A router of this kind as the configuration has it."""
        return cls(moe.experts, moe.top_k, distilled)

    def forward(
        self, hidden_TD: Tensor, tokens: TokenView, fixed_TK: Tensor | None, sum_over_ranks: SumOverRanks
    ) -> Routes:
        """Route T tokens.

        hidden_TD: [T, D], residual stream. fixed_TK: int64 [T, K], the choice where it is made beforehand; then only
        the gate is computed and there are no auxiliary losses. Those are computed in training only.
        """
        raise NotImplementedError

    def after_update(self, counts_N: Tensor, statistic_N: Tensor | None) -> None:
        """Learn what is not learned by gradient, once an update.

        counts_N: fp32 [N], (token, choice) pairs by expert, over all ranks and micro-batches. statistic_N: fp32 [N],
        mean over them of ``Routes.statistic_N``.
        """


class CentroidRouter(Router):
    """Affinity <E_i, h_t> of the residual stream to one centroid an expert (paper section 3.1)."""

    def __init__(
        self,
        hidden_size: int,
        experts: int,
        top_k: int,
        normalize: bool,
        distilled: DistilledRouter | None = None,
        gate: Gate | None = None,
    ) -> None:
        """``normalize``: centroids meet the stream at unit root mean square. gate: instead of the router's own."""
        super().__init__(experts, top_k, distilled)
        self.normalize, self.gate = normalize, gate
        self.centroids = nn.Parameter(torch.empty(experts, hidden_size))

    @classmethod
    def from_config(cls, moe: MoEConfig, hidden_size: int, distilled: DistilledRouter | None) -> Self:
        return cls(hidden_size, moe.experts, moe.top_k, moe.normalizes_input, distilled, make_gate(moe))

    def affinity(self, hidden_TD: Tensor) -> Tensor:
        """fp32 [T, N]: <E_i, h_t>; with ``normalize``, of h_t at unit root mean square."""
        with torch.autocast(hidden_TD.device.type, enabled=False):
            return F.linear(self._seen(hidden_TD).float(), self.centroids)

    def route(self, chosen_TK: Tensor, affinity_TK: Tensor, own_TK: Tensor, tokens: TokenView) -> Routes:
        """Send the tokens to ``chosen_TK``; padding goes nowhere.

        affinity_TK: to the chosen experts, for a gate that the configuration names. own_TK: the router's own gates.
        """
        gate_TK = own_TK if self.gate is None else self.gate(affinity_TK, chosen_TK.clamp_min(0))
        expert_TK = torch.where(tokens.real_T[:, None], chosen_TK, NOT_ROUTED)
        return Routes(expert_TK, gate_TK, {}, count_tokens(expert_TK, self.experts))

    def follow(self, hidden_TD: Tensor, fixed_TK: Tensor, tokens: TokenView) -> Routes:
        """Send the tokens to ``fixed_TK``; their own gate is the sigmoid of their affinity to these experts."""
        if self.gate is not None and self.gate.constant:
            gate_TK = torch.ones(fixed_TK.shape, device=hidden_TD.device)
            return self.route(fixed_TK, gate_TK, gate_TK, tokens)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            affinity_TK = chosen_affinity(self._seen(hidden_TD), self.centroids, fixed_TK.clamp_min(0))
        return self.route(fixed_TK, affinity_TK, torch.sigmoid(affinity_TK), tokens)

    def _seen(self, hidden_TD: Tensor) -> Tensor:
        return F.rms_norm(hidden_TD.float(), hidden_TD.shape[-1:], eps=1e-6) if self.normalize else hidden_TD

    def imitated(self, tokens: TokenView, expert_TK: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """The distillation loss towards ``expert_TK``, in training, and how many real tokens already agree."""
        if self.distilled is None:
            return {}, None
        logits_TN = self.distilled.logits_of(tokens)
        losses = {"distill": distillation_sum(logits_TN, expert_TK)} if self.training else {}
        with torch.no_grad():
            named_TK = best_experts(logits_TN, self.top_k)
            same_T = (named_TK.sort(-1).values == expert_TK.sort(-1).values).all(-1)
            return losses, (same_T & tokens.real_T).sum()
