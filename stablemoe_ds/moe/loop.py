"""A sublayer of the experts, one expert after another: all of an expert is done while its rows are in the cache.

Each expert's weight gradients are written straight into their slices. Indexing a stacked parameter (``weight[e]``)
under autograd would cost a zero gradient of full size an expert instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from stablemoe_ds.moe.segments import Segments
from stablemoe_ds.moe.sublayer import SublayerWeights, activate


def _activate_backward(name: str, grad: Tensor, inner: Tensor) -> Tensor:
    """Gradient of what went into the activation; may change ``grad``. inner: for relu its result, else what went in."""
    aten = torch.ops.aten
    if name == "swiglu":
        gate, value = inner.chunk(2, dim=-1)
        out = torch.empty_like(inner)
        grad_gate, grad_value = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_value)
        grad_gate.copy_(aten.silu_backward(grad.mul_(value), gate))
        return out
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
    def forward(ctx: Any, x_RD: Tensor, activation: str, segments: Segments, *stacked: Any) -> Tensor:
        w = SublayerWeights(*stacked)
        inner_RF = x_RD.new_empty(x_RD.shape[0], w.w1_EFD.shape[1])
        out_RD = torch.empty_like(x_RD)
        for e, rows in segments:
            inner = inner_RF[rows]
            _linear(_scaled(x_RD[rows], w, e), w.w1_EFD[e], None if w.b1_EF is None else w.b1_EF[e], out=inner)
            # The gradient of relu follows from its result, so nothing else is kept.
            active = inner.relu_() if activation == "relu" else activate(activation, inner)
            _linear(active, w.w2_EDF[e], None if w.b2_ED is None else w.b2_ED[e], out=out_RD[rows])
        ctx.save_for_backward(x_RD, inner_RF, *w)
        ctx.activation, ctx.segments = activation, segments
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, inner_RF, *stacked = ctx.saved_tensors
        grad_RD, name, w = grads[0].contiguous(), ctx.activation, SublayerWeights(*stacked)
        grad_x = torch.empty_like(x_RD)
        grad_w = SublayerWeights._make(None if weight is None else torch.empty_like(weight) for weight in w)
        for e, rows in ctx.segments:
            # A product or a sum over zero rows is zero, so an expert without tokens needs no case of its own.
            x, inner, grad = x_RD[rows], inner_RF[rows], grad_RD[rows]
            active = inner if name == "relu" else activate(name, inner)
            torch.mm(grad.t(), active, out=grad_w.w2_EDF[e])
            grad_inner = _activate_backward(name, torch.mm(grad, w.w2_EDF[e]), inner)
            torch.mm(grad_inner.t(), _scaled(x, w, e), out=grad_w.w1_EFD[e])
            grad_scaled = torch.mm(grad_inner, w.w1_EFD[e], out=grad_x[rows])
            torch.sum(grad_scaled * x, dim=0, out=grad_w.scale_ED[e])
            for total, parts in (
                (grad_w.b2_ED, grad),
                (grad_w.b1_EF, grad_inner),
                (grad_w.shift_ED, grad_scaled),
            ):
                if total is not None:
                    torch.sum(parts, dim=0, out=total[e])
            grad_scaled *= w.scale_ED[e]
        return grad_x, None, None, *grad_w


def _scaled(x: Tensor, w: SublayerWeights, expert: int) -> Tensor:
    scale = w.scale_ED[expert]
    return x * scale if w.shift_ED is None else torch.addcmul(w.shift_ED[expert], x, scale)


def serve_in_turn(x_RD: Tensor, weights: SublayerWeights, activation: str, segments: Segments) -> Tensor:
    """What the sublayer makes of each row by the weights of its expert: [R, D].

    x_RD: rows sorted by expert, normalised. Every weight gets a gradient, zero where no row came.
    """
    return _Loop.apply(x_RD, activation, segments, *weights)
