"""A sublayer of all experts at once, by grouped matrix products: for GPUs, where an expert alone is too little work."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from stablemoe_ds.moe.segments import Segments
from stablemoe_ds.moe.sublayer import SublayerWeights, activate

ALIGNED = 8
"""bf16 numbers in 16 bytes: the kernels want every row to begin at a multiple of that."""


def can_group(x_RD: Tensor, w1_EFD: Tensor) -> bool:
    """Whether torch has a kernel that takes these without asking the device for sizes: bf16, Hopper or Blackwell."""
    rows, width = x_RD.shape
    fits = x_RD.is_cuda and x_RD.dtype == torch.bfloat16 and rows > 0
    aligned = width % ALIGNED == 0 and w1_EFD.shape[1] % (2 * ALIGNED) == 0
    return fits and aligned and torch.cuda.get_device_capability(x_RD.device)[0] in (9, 10)


def segment_sums(rows_RI: Tensor, ends_E: Tensor) -> Tensor:
    """[R, I] -> [E, I]: sum over each expert's rows, as a product with ones: deterministic, accumulated in fp32."""
    ones = rows_RI.new_ones(rows_RI.shape[0], ALIGNED)
    return F.grouped_mm(rows_RI.t(), ones, offs=ends_E)[..., 0]


class _Product(Function):
    """Each row times the transposed weight of its expert."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, w_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, w_EOI, ends_E)
        return F.grouped_mm(x_RI, w_EOI.transpose(1, 2), offs=ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, w_EOI, ends_E = ctx.saved_tensors
        grad_RO = grads[0].contiguous()
        return F.grouped_mm(grad_RO, w_EOI, offs=ends_E), F.grouped_mm(grad_RO.t(), x_RI, offs=ends_E), None


class _Spread(Function):
    """Each row gets its expert's values."""

    @staticmethod
    def forward(ctx: Any, values_EI: Tensor, owner_R: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        return values_EI.index_select(0, owner_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ends_E,) = ctx.saved_tensors
        return segment_sums(grads[0].contiguous(), ends_E), None, None


def serve_at_once(x_RD: Tensor, weights: SublayerWeights, activation: str, segments: Segments) -> Tensor:
    """What :func:`stablemoe_ds.moe.loop.serve_in_turn` computes, with the same arguments; at least one row."""
    ends_E, owner_R = segments.ends_E, segments.owners()

    def plus(rows_RI: Tensor, values_EI: Tensor | None) -> Tensor:
        return rows_RI if values_EI is None else rows_RI + _Spread.apply(values_EI, owner_R, ends_E)

    scaled = plus(x_RD * _Spread.apply(weights.scale, owner_R, ends_E), weights.shift)
    inner = activate(activation, plus(_Product.apply(scaled, weights.w1, ends_E), weights.b1))
    return plus(_Product.apply(inner, weights.w2, ends_E), weights.b2)
