"""Products of rows with one of several stacked weights, for rows already sorted by expert.

Indexing a stacked parameter (``weight[e]``) costs a full-size zero gradient per expert in autograd; these
functions write each expert's gradient straight into its slice instead.

Suffixes: R rows sorted by expert, E experts of this rank, I and O inner and outer widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def _segments(splits: Sequence[int]) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, rows in enumerate(splits):
        yield expert, slice(start, start + rows)
        start += rows


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, w_EOI: Tensor, b_EO: Tensor | None, splits: Sequence[int]) -> Tensor:
        out_RO = x_RI.new_empty(x_RI.shape[0], w_EOI.shape[1])
        for e, rows in _segments(splits):
            if b_EO is None:
                torch.mm(x_RI[rows], w_EOI[e].t(), out=out_RO[rows])
            else:
                torch.addmm(b_EO[e], x_RI[rows], w_EOI[e].t(), out=out_RO[rows])
        ctx.save_for_backward(x_RI, w_EOI)
        ctx.splits, ctx.has_bias = splits, b_EO is not None
        return out_RO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, w_EOI = ctx.saved_tensors
        grad_RO = grads[0].contiguous()
        grad_x = torch.empty_like(x_RI) if ctx.needs_input_grad[0] else None
        grad_w = torch.empty_like(w_EOI)
        grad_b = w_EOI.new_empty(w_EOI.shape[:2]) if ctx.has_bias else None
        for e, rows in _segments(ctx.splits):
            if grad_x is not None:
                torch.mm(grad_RO[rows], w_EOI[e], out=grad_x[rows])
            # A product over zero rows is zero, so an expert without tokens needs no case of its own.
            torch.mm(grad_RO[rows].t(), x_RI[rows], out=grad_w[e])
            if grad_b is not None:
                torch.sum(grad_RO[rows], dim=0, out=grad_b[e])
        return grad_x, grad_w, grad_b, None


def grouped_linear(x_RI: Tensor, w_EOI: Tensor, b_EO: Tensor | None, splits: Sequence[int]) -> Tensor:
    """Rows of expert e times ``w_EOI[e].T`` plus ``b_EO[e]``: [R, O].

    splits: rows of each expert, a host list that sums to R. Every weight gets a gradient, zero where no row came.
    """
    return _GroupedLinear.apply(x_RI, w_EOI, b_EO, splits)


class _GroupedScale(Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, scale_EI: Tensor, shift_EI: Tensor | None, splits: Sequence[int]) -> Tensor:
        out_RI = torch.empty_like(x_RI)
        for e, rows in _segments(splits):
            torch.mul(x_RI[rows], scale_EI[e], out=out_RI[rows])
            if shift_EI is not None:
                out_RI[rows] += shift_EI[e]
        ctx.save_for_backward(x_RI, scale_EI)
        ctx.splits, ctx.has_shift = splits, shift_EI is not None
        return out_RI

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, scale_EI = ctx.saved_tensors
        grad_RI = grads[0]
        grad_x = torch.empty_like(x_RI)
        grad_scale = torch.empty_like(scale_EI)
        grad_shift = torch.empty_like(scale_EI) if ctx.has_shift else None
        for e, rows in _segments(ctx.splits):
            torch.mul(grad_RI[rows], scale_EI[e], out=grad_x[rows])
            torch.sum(grad_RI[rows] * x_RI[rows], dim=0, out=grad_scale[e])
            if grad_shift is not None:
                torch.sum(grad_RI[rows], dim=0, out=grad_shift[e])
        return grad_x, grad_scale, grad_shift, None


def grouped_scale(x_RI: Tensor, scale_EI: Tensor, shift_EI: Tensor | None, splits: Sequence[int]) -> Tensor:
    """Rows of expert e times ``scale_EI[e]`` plus ``shift_EI[e]``: the affine part of a per-expert norm."""
    return _GroupedScale.apply(x_RI, scale_EI, shift_EI, splits)
