"""The operations of ``rows.py`` as Triton kernels: every row is read once and written once.

Sums are taken in a fixed order, so that results are the same every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers of a row that one program handles, at most, where a row can be handled in parts."""


@triton.jit
def affine_kernel(
    x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    owner_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.int32,
    relu: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A program is a block of a row. scale_ptr, shift_ptr: may be None."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    expert = tl.load(owner_ptr + row).to(tl.int64)
    out = tl.load(x_ptr + row * width + column, mask=inside).to(tl.float32)
    if scale_ptr is not None:
        out *= tl.load(scale_ptr + expert * width + column, mask=inside).to(tl.float32)
    if shift_ptr is not None:
        out += tl.load(shift_ptr + expert * width + column, mask=inside).to(tl.float32)
    if relu:
        out = tl.where(out < 0, 0.0, out)  # unlike a maximum, keeps a NaN
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dots_kernel(
    states_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    position_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.int32,
    choices: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A program is one choice of one token. block: at least the width."""
    choice = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    position = tl.load(position_ptr + choice)
    state = tl.load(states_ptr + choice // choices * width + column, mask=inside, other=0.0).to(tl.float32)
    row = tl.load(rows_ptr + position * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + choice, tl.sum(state * row).to(out_ptr.dtype.element_ty))


@triton.jit
def weighted_sum_kernel(
    rows_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    position_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.int32,
    choices: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A program is a block of a token. gate_ptr: may be None."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    total = tl.zeros((block,), tl.float32)
    for choice in tl.static_range(choices):
        position = tl.load(position_ptr + token * choices + choice)
        served = tl.where(inside, position, -1) >= 0
        row = tl.load(rows_ptr + position * width + column, mask=served, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            row *= tl.load(gate_ptr + token * choices + choice).to(tl.float32)
        total += row
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def weighted_sum_backward_kernel(
    grad_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    position_ptr: tl.tensor,
    grad_rows_ptr: tl.tensor,
    grad_gate_ptr: tl.tensor,
    width: tl.int32,
    choices: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A program is one choice of one token, whose row is written by no other. block: at least the width."""
    choice = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    position = tl.load(position_ptr + choice)
    gate = tl.load(gate_ptr + choice).to(tl.float32)
    served = tl.where(column < width, position, -1) >= 0
    grad = tl.load(grad_ptr + choice // choices * width + column, mask=served, other=0.0).to(tl.float32)
    row = tl.load(rows_ptr + position * width + column, mask=served, other=0.0).to(tl.float32)
    grad_row = (grad * gate).to(grad_rows_ptr.dtype.element_ty)
    tl.store(grad_rows_ptr + position * width + column, grad_row, mask=served)
    tl.store(grad_gate_ptr + choice, tl.sum(grad * row).to(grad_gate_ptr.dtype.element_ty))


@triton.jit
def swiglu_kernel(inner_ptr: tl.tensor, out_ptr: tl.tensor, width: tl.int32, block: tl.constexpr) -> None:
    """A program is a block of a row. width: of the result, half that of a row of ``inner_ptr``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    inner_ptr += row * 2 * width + column
    gate = tl.load(inner_ptr, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(inner_ptr + width, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * value
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    grad_ptr: tl.tensor, inner_ptr: tl.tensor, out_ptr: tl.tensor, width: tl.int32, block: tl.constexpr
) -> None:
    """A program is a block of a row of ``grad_ptr``, and writes two of a row of ``out_ptr``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    at = row * 2 * width + column
    grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(inner_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(inner_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
    opened = tl.sigmoid(gate)
    grad_gate = grad * value * opened * (1 + gate * (1 - opened))
    tl.store(out_ptr + at, grad_gate.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + at + width, (grad * gate * opened).to(out_ptr.dtype.element_ty), mask=inside)


def affine(
    x_RI: Tensor, scale_EI: Tensor | None, shift_EI: Tensor | None, owner_R: Tensor, relu: bool = False
) -> Tensor:
    """See :class:`stablemoe_ds.ops.rows.RowOps`."""
    x_RI = x_RI.contiguous()
    (rows, width), out_RI = x_RI.shape, torch.empty_like(x_RI)
    _launch_in_parts(affine_kernel, rows, width, x_RI, scale_EI, shift_EI, owner_R, out_RI, width, relu=relu)
    return out_RI


def dots(states_TD: Tensor, rows_AD: Tensor, position_TK: Tensor) -> Tensor:
    """See :class:`stablemoe_ds.ops.rows.RowOps`."""
    states_TD, rows_AD, position_TK = states_TD.contiguous(), rows_AD.contiguous(), position_TK.contiguous()
    width, choices = rows_AD.shape[1], position_TK.shape[1]
    out_TK = rows_AD.new_empty(position_TK.shape)
    _launch_whole(dots_kernel, out_TK.numel(), width, states_TD, rows_AD, position_TK, out_TK, width, choices=choices)
    return out_TK


def weighted_sum(
    rows_AD: Tensor, gate_TK: Tensor | None, position_TK: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """See :class:`stablemoe_ds.ops.rows.RowOps`."""
    rows_AD, gate_TK = rows_AD.contiguous(), None if gate_TK is None else gate_TK.contiguous()
    (tokens, choices), width = position_TK.shape, rows_AD.shape[1]
    out_TD = rows_AD.new_empty(tokens, width, dtype=dtype)
    operands = (rows_AD, gate_TK, position_TK.contiguous(), out_TD)
    _launch_in_parts(weighted_sum_kernel, tokens, width, *operands, width, choices=choices)
    return out_TD


def weighted_sum_backward(
    grad_TD: Tensor, rows_AD: Tensor, gate_TK: Tensor, order_A: Tensor, position_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """See :class:`stablemoe_ds.ops.rows.RowOps`."""
    grad_TD, rows_AD, gate_TK = grad_TD.contiguous(), rows_AD.contiguous(), gate_TK.contiguous()
    grad_rows_AD, grad_gate_TK = torch.empty_like(rows_AD), torch.empty_like(gate_TK)
    width, choices = rows_AD.shape[1], gate_TK.shape[1]
    operands = (grad_TD, rows_AD, gate_TK, position_TK.contiguous(), grad_rows_AD, grad_gate_TK)
    _launch_whole(weighted_sum_backward_kernel, gate_TK.numel(), width, *operands, width, choices=choices)
    return grad_rows_AD, grad_gate_TK


def swiglu(inner_RF: Tensor) -> Tensor:
    """See :class:`stablemoe_ds.ops.rows.RowOps`."""
    inner_RF = inner_RF.contiguous()
    rows, width = inner_RF.shape[0], inner_RF.shape[1] // 2
    out_RF = inner_RF.new_empty(rows, width)
    _launch_in_parts(swiglu_kernel, rows, width, inner_RF, out_RF, width)
    return out_RF


def swiglu_backward(grad_RF: Tensor, inner_RF: Tensor) -> Tensor:
    """See :class:`stablemoe_ds.ops.rows.RowOps`."""
    grad_RF, inner_RF = grad_RF.contiguous(), inner_RF.contiguous()
    (rows, width), out_RF = grad_RF.shape, torch.empty_like(inner_RF)
    _launch_in_parts(swiglu_backward_kernel, rows, width, grad_RF, inner_RF, out_RF, width)
    return out_RF


def _launch_in_parts(kernel: Any, rows: int, width: int, *operands: Any, **fixed: Any) -> None:
    """A program for each block of each row."""
    block = min(BLOCK, triton.next_power_of_2(width))
    _launch(kernel, (rows, triton.cdiv(width, block)), *operands, block=block, **fixed)


def _launch_whole(kernel: Any, rows: int, width: int, *operands: Any, **fixed: Any) -> None:
    """A program for each row, in one block, that as many warps share as its length deserves."""
    block = triton.next_power_of_2(width)
    _launch(kernel, (rows,), *operands, block=block, num_warps=min(max(block // 256, 1), 16), **fixed)


def _launch(kernel: Any, programs: tuple[int, ...], first: Tensor, *operands: Any, **fixed: Any) -> None:
    """Start it on the device of its first operand; nothing where there are no rows."""
    if programs[0]:
        with torch.cuda.device_of(first):
            kernel[programs](first, *operands, **fixed)
