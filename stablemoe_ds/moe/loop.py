"""A sublayer of the experts, one expert after another: all of an expert is done while its rows are in the cache.

Each expert's weight gradients are written straight into their slices. Indexing a stacked parameter (``weight[e]``)
under autograd would cost a zero gradient of full size an expert instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stablemoe_ds.moe.expert_offsets import ExpertOffsets
from stablemoe_ds.moe.sublayer import SublayerWeights, activate
from stablemoe_ds.ops.rows import swiglu_backward


def _activate_backward(name: str, grad: Tensor, inner: Tensor) -> Tensor:
    """Gradient of what went into the activation; may change ``grad``. inner: for relu its result, else what went in."""
    aten = torch.ops.aten
    if name == "swiglu":
        return swiglu_backward(grad, inner)
    if name == "relu":
        return aten.threshold_backward.grad_input(grad, inner, 0, grad_input=grad)
    return aten.gelu_backward(grad, inner)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


class _Loop(Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, activation: str, offsets: ExpertOffsets, *stacked: Any) -> Tensor:
        weights = SublayerWeights(*stacked)
        inner_RF = x_RD.new_empty(x_RD.shape[0], weights.w1.shape[1])
        out_RD = torch.empty_like(x_RD)
        for (x, inner, out), w in zip(offsets.split(x_RD, inner_RF, out_RD), weights.each(), strict=True):
            _linear(_scaled(x, w), w.w1, w.b1, out=inner)
            # The gradient of relu follows from its result, so nothing else is kept.
            active = inner.relu_() if activation == "relu" else activate(activation, inner)
            _linear(active, w.w2, w.b2, out=out)
        ctx.save_for_backward(x_RD, inner_RF, *weights)
        ctx.activation, ctx.offsets = activation, offsets
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, inner_RF, *stacked = ctx.saved_tensors
        name, weights = ctx.activation, SublayerWeights(*stacked)
        grad_x_RD = torch.empty_like(x_RD)
        grad_weights = SublayerWeights._make(None if w is None else torch.empty_like(w) for w in weights)
        rows = ctx.offsets.split(x_RD, inner_RF, grads[0], grad_x_RD)
        for (x, inner, grad, grad_x), w, grad_w in zip(rows, weights.each(), grad_weights.each(), strict=True):
            # A product or a sum over zero rows is zero, so an expert without tokens needs no case of its own.
            active = inner if name == "relu" else activate(name, inner)
            torch.mm(grad.t(), active, out=grad_w.w2)
            grad_inner = _activate_backward(name, torch.mm(grad, w.w2), inner)
            torch.mm(grad_inner.t(), _scaled(x, w), out=grad_w.w1)
            torch.mm(grad_inner, w.w1, out=grad_x)
            torch.sum(grad_x * x, dim=0, out=grad_w.scale)
            if w.shift is not None:
                torch.sum(grad_x, dim=0, out=grad_w.shift)
            if w.b1 is not None:
                torch.sum(grad_inner, dim=0, out=grad_w.b1)
                torch.sum(grad, dim=0, out=grad_w.b2)
            grad_x *= w.scale
        return grad_x_RD, None, None, *grad_weights


def _scaled(x: Tensor, w: SublayerWeights) -> Tensor:
    return x * w.scale if w.shift is None else torch.addcmul(w.shift, x, w.scale)


def serve_in_a_loop(x_RD: Tensor, weights: SublayerWeights, activation: str, offsets: ExpertOffsets) -> Tensor:
    """What the sublayer makes of each row by the weights of its expert: [R, D].

    x_RD: rows sorted by expert, normalised. Every weight gets a gradient, zero where no row came.
    """
    return _Loop.apply(x_RD, activation, offsets, *weights)
