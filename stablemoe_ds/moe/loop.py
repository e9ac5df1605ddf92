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


def _activate(name: str, inner: Tensor) -> Tensor:
    """Changes ``inner`` itself for relu, whose gradient follows from its result."""
    if name == "swiglu":
        gate, value = inner.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)
    return inner.relu_() if name == "relu" else F.gelu(inner)


def _activate_backward(name: str, grad: Tensor, inner: Tensor) -> Tensor:
    """Gradient of what went into the activation; may change ``grad``. inner: as :func:`_activate` left it."""
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
    def forward(
        ctx: Any,
        x_RD: Tensor,
        scale_ED: Tensor,
        shift_ED: Tensor | None,
        w1_EFD: Tensor,
        b1_EF: Tensor | None,
        w2_EDF: Tensor,
        b2_ED: Tensor | None,
        activation: str,
        segments: Segments,
    ) -> Tensor:
        inner_RF = x_RD.new_empty(x_RD.shape[0], w1_EFD.shape[1])
        out_RD = torch.empty_like(x_RD)
        for e, rows in segments:
            inner = inner_RF[rows]
            scaled = _scaled(x_RD[rows], scale_ED, shift_ED, e)
            _linear(scaled, w1_EFD[e], None if b1_EF is None else b1_EF[e], out=inner)
            _linear(_activate(activation, inner), w2_EDF[e], None if b2_ED is None else b2_ED[e], out=out_RD[rows])
        ctx.save_for_backward(x_RD, inner_RF, scale_ED, shift_ED, w1_EFD, w2_EDF)
        ctx.activation, ctx.segments, ctx.has_bias = activation, segments, b1_EF is not None
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, inner_RF, scale_ED, shift_ED, w1_EFD, w2_EDF = ctx.saved_tensors
        grad_RD, name = grads[0].contiguous(), ctx.activation
        grad_x, grad_scale = torch.empty_like(x_RD), torch.empty_like(scale_ED)
        grad_shift = None if shift_ED is None else torch.empty_like(shift_ED)
        grad_w1, grad_w2 = torch.empty_like(w1_EFD), torch.empty_like(w2_EDF)
        grad_b1 = w1_EFD.new_empty(w1_EFD.shape[:2]) if ctx.has_bias else None
        grad_b2 = w2_EDF.new_empty(w2_EDF.shape[:2]) if ctx.has_bias else None
        for e, rows in ctx.segments:
            # A product or a sum over zero rows is zero, so an expert without tokens needs no case of its own.
            x, inner, grad = x_RD[rows], inner_RF[rows], grad_RD[rows]
            active = inner if name == "relu" else _activate(name, inner)
            torch.mm(grad.t(), active, out=grad_w2[e])
            grad_inner = _activate_backward(name, torch.mm(grad, w2_EDF[e]), inner)
            torch.mm(grad_inner.t(), _scaled(x, scale_ED, shift_ED, e), out=grad_w1[e])
            grad_scaled = torch.mm(grad_inner, w1_EFD[e], out=grad_x[rows])
            torch.sum(grad_scaled * x, dim=0, out=grad_scale[e])
            for total, parts in ((grad_b2, grad), (grad_b1, grad_inner), (grad_shift, grad_scaled)):
                if total is not None:
                    torch.sum(parts, dim=0, out=total[e])
            grad_scaled *= scale_ED[e]
        return grad_x, grad_scale, grad_shift, grad_w1, grad_b1, grad_w2, grad_b2, None, None


def _scaled(x: Tensor, scale_ED: Tensor, shift_ED: Tensor | None, expert: int) -> Tensor:
    return x * scale_ED[expert] if shift_ED is None else torch.addcmul(shift_ED[expert], x, scale_ED[expert])


def serve_in_turn(
    x_RD: Tensor,
    scale_ED: Tensor,
    shift_ED: Tensor | None,
    w1_EFD: Tensor,
    b1_EF: Tensor | None,
    w2_EDF: Tensor,
    b2_ED: Tensor | None,
    activation: str,
    segments: Segments,
) -> Tensor:
    """W2 act(W1 (scale x + shift) + b1) + b2 of each row's expert: [R, D].

    x_RD: rows sorted by expert, normalised. scale, shift: the affine part of each expert's norm. w1: [E, F, D], or
    [E, 2F, D] for swiglu (gate half first). Both biases or none. Every weight gets a gradient, zero where no row came.
    """
    return _Loop.apply(x_RD, scale_ED, shift_ED, w1_EFD, b1_EF, w2_EDF, b2_ED, activation, segments)
