"""Carries tokens to the ranks of their experts and back, following a :class:`DispatchPlan`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from stablemoe_ds.moe.plan import DispatchPlan


class _AllToAllRows(Function):
    """Uneven all-to-all of rows; its gradient is the same exchange backwards."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, recv: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (recv, send), group
        out = rows.new_empty(sum(recv), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), recv, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recv, send = ctx.splits
        return _AllToAllRows.apply(grads[0], send, recv, ctx.group), None, None, None


class _Permute(Function):
    """Rows in another order, by a permutation; backward is a gather too, not a scatter-add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse(order)), None


def inverse(permutation: Tensor) -> Tensor:
    """The permutation that undoes this one."""
    out = torch.empty_like(permutation)
    out[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return out


def send_tokens(hidden_TD: Tensor, plan: DispatchPlan, top_k: int, group: dist.ProcessGroup | None) -> Tensor:
    """[T, D] -> [R, D]: the rows for this rank's experts, sorted by expert."""
    rows_AD = hidden_TD.index_select(0, plan.order_A // top_k if top_k > 1 else plan.order_A)
    if group is None:
        return rows_AD
    arrived = _AllToAllRows.apply(rows_AD, plan.recv_splits, plan.send_splits, group)
    return _Permute.apply(arrived, plan.arrival_R)


def return_tokens(rows_RD: Tensor, plan: DispatchPlan, group: dist.ProcessGroup | None) -> Tensor:
    """[R, D] -> [A, D]: the rows back at the ranks of their tokens, in the order of ``plan.order_A``."""
    if group is None or plan.arrival_R is None:
        return rows_RD
    arrived = _Permute.apply(rows_RD, inverse(plan.arrival_R))
    return _AllToAllRows.apply(arrived, plan.send_splits, plan.recv_splits, group)


def combine(rows_AD: Tensor, gate_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """Sum over a token's K experts of gate times what the expert adds: [T, D], zero where nothing was routed."""
    tokens, top_k = gate_TK.shape
    gate_A = gate_TK.reshape(-1).index_select(0, plan.order_A)
    weighted_AD = rows_AD * gate_A.to(rows_AD.dtype)[:, None]
    out_TD = rows_AD.new_zeros(tokens, rows_AD.shape[1])
    return out_TD.index_add(0, plan.order_A // top_k, weighted_AD)
