"""The experts one rank holds: stacks of K residual feed-forward sublayers (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablemoe_ds.moe.expert_offsets import ExpertOffsets
from stablemoe_ds.moe.grouped import can_group, serve_grouped
from stablemoe_ds.moe.loop import serve_in_a_loop
from stablemoe_ds.moe.sublayer import SublayerWeights
from stablemoe_ds.ops.compiler import compile_once


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
    """W2 act(W1 norm(x) + b1) + b2, what is added to the stream, with weights stacked over E experts.

    w1: [E, F, D], or [E, 2F, D] for swiglu (gate half first). w2: [E, D, F].
    """

    def __init__(self, shape: ExpertShape, experts: int, compiled: bool) -> None:
        super().__init__()
        d, f = shape.hidden_size, shape.ffn_hidden_size
        f_in = 2 * f if shape.activation == "swiglu" else f
        self.shape = shape
        self.serve_in_training = compile_once(_served_at_once) if compiled else _served_at_once
        self.norm_weight = nn.Parameter(torch.ones(experts, d))
        self.norm_bias = nn.Parameter(torch.zeros(experts, d)) if shape.norm == "layernorm" else None
        self.w1 = nn.Parameter(torch.zeros(experts, f_in, d))
        self.b1 = nn.Parameter(torch.zeros(experts, f_in)) if shape.bias else None
        self.w2 = nn.Parameter(torch.zeros(experts, d, f))
        self.b2 = nn.Parameter(torch.zeros(experts, d)) if shape.bias else None

    def forward(self, x_RD: Tensor, offsets: ExpertOffsets) -> Tensor:
        """What the sublayer adds to rows sorted by expert: [R, D]."""
        weights = SublayerWeights(self.norm_weight, self.norm_bias, self.w1, self.b1, self.w2, self.b2)
        if not can_group(x_RD, self.w1):
            return serve_in_a_loop(_normed(x_RD, self.shape), weights, self.shape.activation, offsets)
        # In training alone: generation has other numbers of rows in every call, each to be compiled again.
        serve = self.serve_in_training if self.training else _served_at_once
        return serve(x_RD, weights, self.shape, offsets.ends_E)


def _normed(x_RD: Tensor, shape: ExpertShape) -> Tensor:
    """Rows without the affine part of the norm, which is each expert's own."""
    norm = F.layer_norm if shape.norm == "layernorm" else F.rms_norm
    return norm(x_RD, x_RD.shape[-1:], eps=shape.norm_epsilon)


def _served_at_once(x_RD: Tensor, weights: SublayerWeights, shape: ExpertShape, ends_E: Tensor) -> Tensor:
    return serve_grouped(_normed(x_RD, shape), weights, shape.activation, ends_E)


class Experts(nn.Module):
    """E experts side by side, for rows sorted by expert.

    compiled: fuse what is between the grouped products, by torch.compile; where experts are served one after another,
    there is nothing to fuse.
    """

    def __init__(self, shape: ExpertShape, experts: int, compiled: bool = False) -> None:
        super().__init__()
        self.compiled = compiled
        self.sublayers = nn.ModuleList(ExpertSublayer(shape, experts, compiled) for _ in range(shape.sublayers))

    def are_one_graph(self, x_RD: Tensor) -> bool:
        """Whether rows like these are served by compiled code that no size on the host decides about."""
        return self.compiled and all(can_group(x_RD, sublayer.get_parameter("w1")) for sublayer in self.sublayers)

    def forward(self, x_RD: Tensor, offsets: ExpertOffsets) -> Tensor:
        """What each expert *adds* to its rows: stack(x) - x, [R, D]. Rows sorted by expert."""
        first, *others = self.sublayers
        added_RD = first(x_RD, offsets)
        for sublayer in others:
            added_RD = added_RD + sublayer(x_RD + added_RD, offsets)
        return added_RD


MakeExperts = Callable[[ExpertShape, int, bool], nn.Module]
"""Makes experts as :class:`Experts` is made, or what can be called like it."""
