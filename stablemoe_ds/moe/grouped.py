"""A sublayer of all experts at once, by grouped matrix products: for GPUs, where an expert alone is too little work."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from stablemoe_ds.moe.expert_offsets import owners
from stablemoe_ds.moe.sublayer import SublayerWeights
from stablemoe_ds.ops.rows import ops_for

ALIGNED = 8
"""bf16 numbers in 16 bytes: the kernels want every row to begin at a multiple of that."""


def has_grouped_kernel(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability has torch's grouped product: Hopper only.

    Blackwell has one too, but there the gradient of an expert without rows is not zero (pytorch issue 172439).
    """
    return capability[0] == 9


def can_group(x_RD: Tensor, w1_EFD: Tensor) -> bool:
    """Whether torch has a kernel that takes these without asking the device for sizes: bf16 on a GPU that has one."""
    rows, width = x_RD.shape
    fits = x_RD.is_cuda and x_RD.dtype == torch.bfloat16 and rows > 0
    aligned = width % ALIGNED == 0 and w1_EFD.shape[1] % (2 * ALIGNED) == 0
    return fits and aligned and has_grouped_kernel(torch.cuda.get_device_capability(x_RD.device))


def sums_by_expert(rows_RI: Tensor, ends_E: Tensor) -> Tensor:
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


class _Affine(Function):
    """Each row times its expert's scale, plus its expert's shift, then relu if asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RI: Tensor,
        scale_EI: Tensor | None,
        shift_EI: Tensor | None,
        owner_R: Tensor,
        ends_E: Tensor,
        relu: bool,
    ) -> Tensor:
        ctx.ops, ctx.relu, ctx.shifts = ops_for(x_RI), relu, shift_EI is not None
        out_RI: Tensor = ctx.ops.affine(x_RI, scale_EI, shift_EI, owner_R, relu)
        scaled, kept = scale_EI is not None, out_RI if relu else None
        ctx.save_for_backward(x_RI if scaled else None, scale_EI, kept, owner_R, ends_E)
        return out_RI

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, scale_EI, out_RI, owner_R, ends_E = ctx.saved_tensors
        grad_RI, grad_scale_EI = grads[0].contiguous(), None
        if ctx.relu:
            grad_RI = torch.ops.aten.threshold_backward(grad_RI, out_RI, 0)
        grad_shift_EI = sums_by_expert(grad_RI, ends_E) if ctx.shifts else None
        if scale_EI is not None:
            grad_scale_EI = sums_by_expert(grad_RI * x_RI, ends_E)
            grad_RI = ctx.ops.affine(grad_RI, scale_EI, None, owner_R)
        return grad_RI, grad_scale_EI, grad_shift_EI, None, None, None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, inner_RF: Tensor) -> Tensor:
        ctx.ops = ops_for(inner_RF)
        ctx.save_for_backward(inner_RF)
        return ctx.ops.swiglu(inner_RF)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # The gradient came from a product, is nobody else's, and may be changed.
        grad_inner_RF: Tensor = ctx.ops.swiglu_backward(grads[0], ctx.saved_tensors[0])
        return grad_inner_RF


def serve_grouped(x_RD: Tensor, weights: SublayerWeights, activation: str, ends_E: Tensor) -> Tensor:
    """What :func:`stablemoe_ds.moe.loop.serve_in_a_loop` computes; at least one row.

    ends_E: int32, where each expert's rows end. Nothing here depends on the sizes but through it, so that one compiled
    graph serves all routes.
    """
    owner_R = owners(ends_E, x_RD.shape[0])

    def plus(rows_RI: Tensor, values_EI: Tensor | None, relu: bool = False) -> Tensor:
        if values_EI is None and not relu:
            return rows_RI
        return _Affine.apply(rows_RI, None, values_EI, owner_R, ends_E, relu)

    scaled_RD = _Affine.apply(x_RD, weights.scale, weights.shift, owner_R, ends_E, False)
    inner_RF = plus(_Product.apply(scaled_RD, weights.w1, ends_E), weights.b1, relu=activation == "relu")
    if activation == "swiglu":
        inner_RF = _SwiGLU.apply(inner_RF)
    elif activation == "gelu":
        inner_RF = F.gelu(inner_RF)
    return plus(_Product.apply(inner_RF, weights.w2, ends_E), weights.b2)
