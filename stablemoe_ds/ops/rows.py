"""What is done to rows besides multiplying them by matrices. All of it takes as long as memory takes to move the rows.

Each operation is here in plain torch, which reads and writes the rows several times, and in ``triton_rows.py`` as a
kernel for GPUs that does so once. Under torch.compile it is plain torch that runs: Inductor fuses it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_kernels_allowed = True


class RowOps(Protocol):
    """The operations, by either way. Kernels compute in fp32 and round once; plain torch rounds after each step."""

    def affine(
        self, x_RI: Tensor, scale_EI: Tensor | None, shift_EI: Tensor | None, owner_R: Tensor, relu: bool = False
    ) -> Tensor:
        """Each row times its expert's scale, plus its expert's shift, negative values made zero if relu: [R, I].

        owner_R: int32 [R], the expert of each row.
        """

    def dots(self, states_TD: Tensor, rows_AD: Tensor, position_TK: Tensor) -> Tensor:
        """[T, K], in the type of the rows: products of each token's state with the rows that its choices name.

        position_TK: int64, where each choice's row stands, none negative.
        """

    def weighted_sum(
        self, rows_AD: Tensor, gate_TK: Tensor | None, position_TK: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """[T, D]: sum over a token's K choices of gate times row, without gates of the rows.

        position_TK: int64, where each choice's row stands; negative for a choice that has none and adds nothing.
        dtype: of the result, if not that of the rows.
        """

    def weighted_sum_backward(
        self, grad_TD: Tensor, rows_AD: Tensor, gate_TK: Tensor, order_A: Tensor, position_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of rows and gates, where each row is one choice's. order_A: int64, the choice t * K + k of each."""

    def swiglu(self, inner_RF: Tensor) -> Tensor:
        """[R, 2F] -> [R, F]: silu of the first half of each row, times the second half."""

    def swiglu_backward(self, grad_RF: Tensor, inner_RF: Tensor) -> Tensor:
        """[R, 2F]: gradient of ``inner_RF``; may change ``grad_RF``."""


def affine(
    x_RI: Tensor, scale_EI: Tensor | None, shift_EI: Tensor | None, owner_R: Tensor, relu: bool = False
) -> Tensor:
    """See :class:`RowOps`."""
    out_RI = x_RI if scale_EI is None else x_RI * scale_EI.index_select(0, owner_R)
    if shift_EI is not None:
        out_RI = out_RI + shift_EI.index_select(0, owner_R)
    return F.relu(out_RI) if relu else out_RI


def dots(states_TD: Tensor, rows_AD: Tensor, position_TK: Tensor) -> Tensor:
    """See :class:`RowOps`."""
    return _taken(rows_AD, position_TK).mul_(states_TD[:, None]).sum(-1)


def weighted_sum(
    rows_AD: Tensor, gate_TK: Tensor | None, position_TK: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """See :class:`RowOps`."""
    if len(rows_AD) < position_TK.numel():  # else every choice has a row of its own
        served_TK = position_TK >= 0
        gate_TK = served_TK.to(rows_AD.dtype) if gate_TK is None else gate_TK.where(served_TK, 0)
    if len(rows_AD) == 0:
        return rows_AD.new_zeros(len(position_TK), rows_AD.shape[1], dtype=dtype)
    rows_TKD = _taken(rows_AD, position_TK.clamp_min(0))
    if gate_TK is not None:
        rows_TKD.mul_(gate_TK[..., None])
    # One choice needs no sum; in bf16 on a CPU that would take as long as all the rest.
    out_TD = rows_TKD.squeeze(1) if position_TK.shape[1] == 1 else rows_TKD.sum(1)
    return out_TD if dtype is None else out_TD.to(dtype)


def _taken(rows_AD: Tensor, position_TK: Tensor) -> Tensor:
    """[T, K, D], new."""
    return rows_AD.index_select(0, position_TK.reshape(-1)).view(*position_TK.shape, rows_AD.shape[1])


def weighted_sum_backward(
    grad_TD: Tensor, rows_AD: Tensor, gate_TK: Tensor, order_A: Tensor, position_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """See :class:`RowOps`."""
    choices = gate_TK.shape[1]
    grad_AD = grad_TD.index_select(0, order_A // choices if choices > 1 else order_A)
    dot_A = (grad_AD * rows_AD).sum(-1)
    grad_gate_TK = torch.zeros_like(gate_TK).view(-1).index_copy_(0, order_A, dot_A).view_as(gate_TK)
    return grad_AD.mul_(gate_TK.reshape(-1).index_select(0, order_A)[:, None]), grad_gate_TK


def swiglu(inner_RF: Tensor) -> Tensor:
    """See :class:`RowOps`."""
    gate, value = inner_RF.chunk(2, dim=-1)
    return F.silu(gate) * value


def swiglu_backward(grad_RF: Tensor, inner_RF: Tensor) -> Tensor:
    """See :class:`RowOps`."""
    gate, value = inner_RF.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # which does not write into slices, but fuses what is written next to each other
        grad_gate = torch.ops.aten.silu_backward(grad_RF * value, gate)
        return torch.cat([grad_gate, grad_RF * F.silu(gate)], dim=-1)
    out_RF = torch.empty_like(inner_RF)
    grad_gate, grad_value = out_RF.chunk(2, dim=-1)
    torch.mul(grad_RF, F.silu(gate), out=grad_value)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad_RF.mul_(value), gate))
    return out_RF


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, plain torch on GPUs, too: to compare with."""
    global _kernels_allowed
    before, _kernels_allowed = _kernels_allowed, False
    try:
        yield
    finally:
        _kernels_allowed = before


def ops_for(rows: Tensor) -> RowOps:
    """The operations that suit these rows: kernels, or plain torch."""
    if torch.compiler.is_compiling() or not (rows.is_cuda and rows.dtype in KERNEL_TYPES and _kernels_allowed):
        return _PLAIN
    return _kernels()


_PLAIN = cast(RowOps, sys.modules[__name__])


@cache
def _kernels() -> RowOps:
    """Triton comes with torch for CUDA on Linux; elsewhere it is plain torch again."""
    if find_spec("triton") is None:
        return _PLAIN
    return cast(RowOps, import_module("stablemoe_ds.ops.triton_rows"))
