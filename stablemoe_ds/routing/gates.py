"""Gates that a configuration may give a router instead of its own: the weight of what an expert adds to a token.

Each is a function of the affinity s of a token and an expert that serves it. docs/method.md says what they are for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.routing.distilled import Fp32Module


class Gate(Fp32Module):
    """Base of all gates. ``constant``: it needs no affinity."""

    constant = False

    def forward(self, affinity_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """fp32 [T, K]: the gates of the experts ``expert_TK``, int64 in 0..N-1, by their affinity, fp32."""
        raise NotImplementedError


class SigmoidGate(Gate):
    """sigmoid(s), the paper's (eq. 7): a half at affinity 0."""

    def forward(self, affinity_TK: Tensor, expert_TK: Tensor) -> Tensor:
        return torch.sigmoid(affinity_TK)


class DoubledGate(Gate):
    """2 sigmoid(s): 1 at affinity 0, so that an expert counts in full from the start."""

    def forward(self, affinity_TK: Tensor, expert_TK: Tensor) -> Tensor:
        return 2 * torch.sigmoid(affinity_TK)


class LearnedGate(Gate):
    """2 sigmoid(a_i s + b_i) with two learned numbers an expert, which start as 1 and 0: as :class:`DoubledGate`."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.scale_N, self.bias_N = (nn.Parameter(torch.empty(experts)) for _ in range(2))

    def forward(self, affinity_TK: Tensor, expert_TK: Tensor) -> Tensor:
        # A lookup as of embeddings: unlike that of an index, its gradient is added up in the same order every time.
        scale_TK, bias_TK = F.embedding(expert_TK, torch.stack([self.scale_N, self.bias_N], 1)).unbind(-1)
        return 2 * torch.sigmoid(scale_TK * affinity_TK + bias_TK)


class OneGate(Gate):
    """1, whatever the affinity: nothing is learned by it."""

    constant = True

    def forward(self, affinity_TK: Tensor, expert_TK: Tensor) -> Tensor:
        return torch.ones_like(affinity_TK)


def make_gate(moe: MoEConfig) -> Gate | None:
    """The gate that ``moe.gate`` names, uninitialised; None: the router's own."""
    if moe.gate_name == moe.facts.gate:
        return None
    if moe.gate_name == "learned":
        return LearnedGate(moe.experts)
    return {"sigmoid": SigmoidGate, "doubled": DoubledGate, "one": OneGate}[moe.gate_name]()
