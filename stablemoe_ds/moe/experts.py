"""The experts one rank holds: stacks of K residual feed-forward sublayers (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablemoe_ds.moe.grouped import grouped_linear, grouped_scale


@dataclass(frozen=True)
class ExpertShape:
    """What one expert looks like. ``activation`` and ``norm`` take the names of the model section."""

    hidden_size: int
    ffn_hidden_size: int
    sublayers: int
    activation: str
    norm: str
    norm_epsilon: float
    bias: bool


class ExpertSublayer(nn.Module):
    """x + W2 act(W1 norm(x) + b1) + b2, with weights stacked over E experts.

    w1: [E, F, D], or [E, 2F, D] for swiglu (gate half first). w2: [E, D, F].
    """

    def __init__(self, shape: ExpertShape, experts: int) -> None:
        super().__init__()
        d, f = shape.hidden_size, shape.ffn_hidden_size
        f_in = 2 * f if shape.activation == "swiglu" else f
        self.shape = shape
        self.norm_weight = nn.Parameter(torch.ones(experts, d))
        self.norm_bias = nn.Parameter(torch.zeros(experts, d)) if shape.norm == "layernorm" else None
        self.w1 = nn.Parameter(torch.empty(experts, f_in, d))
        self.b1 = nn.Parameter(torch.zeros(experts, f_in)) if shape.bias else None
        self.w2 = nn.Parameter(torch.zeros(experts, d, f))
        self.b2 = nn.Parameter(torch.zeros(experts, d)) if shape.bias else None

    def forward(self, x_RD: Tensor, splits: Sequence[int]) -> Tensor:
        width = x_RD.shape[-1:]
        if self.shape.norm == "layernorm":
            normed = F.layer_norm(x_RD, width, eps=self.shape.norm_epsilon)
        else:
            normed = F.rms_norm(x_RD, width, eps=self.shape.norm_epsilon)
        normed = grouped_scale(normed, self.norm_weight, self.norm_bias, splits)
        inner = grouped_linear(normed, self.w1, self.b1, splits)
        if self.shape.activation == "swiglu":
            gate, value = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * value
        else:
            inner = F.relu(inner) if self.shape.activation == "relu" else F.gelu(inner)
        return x_RD + grouped_linear(inner, self.w2, self.b2, splits)


class Experts(nn.Module):
    """E experts side by side, for rows sorted by expert."""

    def __init__(self, shape: ExpertShape, experts: int) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(ExpertSublayer(shape, experts) for _ in range(shape.sublayers))

    def forward(self, x_RD: Tensor, splits: Sequence[int]) -> Tensor:
        """What each expert *adds* to its rows: stack(x) - x, [R, D]. Rows sorted by expert, ``splits`` rows each."""
        y_RD = x_RD
        for sublayer in self.sublayers:
            y_RD = sublayer(y_RD, splits)
        return y_RD - x_RD
