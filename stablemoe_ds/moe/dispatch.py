"""Carries tokens to the ranks of their experts and back, following a :class:`DispatchPlan`.

Rows travel while something else is computed: one call begins an exchange, another waits for it. In the backward pass
the two change places: the gradients' exchange begins where the rows were waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from stablemoe_ds.moe.plan import DispatchPlan
from stablemoe_ds.ops.rows import ops_for


class _Exchange:
    """One uneven all-to-all of rows and, in the backward pass, its reverse."""

    def __init__(self, send: list[int], recv: list[int], group: dist.ProcessGroup) -> None:
        self._splits, self._group = (send, recv), group
        self._travelling: tuple[dist.Work, Tensor, Tensor] | None = None

    def begin(self, rows: Tensor, back: bool = False) -> Tensor:
        """Start; what is returned is complete after :meth:`wait`. back: in the other direction."""
        send, recv = reversed(self._splits) if back else self._splits
        rows, out = rows.contiguous(), rows.new_empty(sum(recv), *rows.shape[1:])
        work = dist.all_to_all_single(out, rows, recv, send, group=self._group, async_op=True)
        self._travelling = (work, rows, out)
        return out

    def wait(self) -> Tensor:
        """What has arrived."""
        assert self._travelling is not None
        work, _, out = self._travelling
        work.wait()
        self._travelling = None
        return out


class _Begin(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.begin(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange.wait(), None  # the gradient that comes in has been sent away by _Wait


class _Wait(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.begin(grads[0], back=True)
        return grads[0], None


class _Permute(Function):
    """Rows in another order; the backward pass gathers, too, instead of adding up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _TokensToRows(Function):
    """[T, D] -> [A, D], a row for each routed (token, choice) pair."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, order_A: Tensor, position_TK: Tensor) -> Tensor:
        ctx.save_for_backward(position_TK)
        ctx.ops = ops_for(hidden_TD)
        choices = position_TK.shape[1]
        return hidden_TD.index_select(0, order_A // choices if choices > 1 else order_A)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ops.weighted_sum(grads[0], None, ctx.saved_tensors[0]), None, None


class _RowsToTokens(Function):
    """[A, D] -> [T, D], the sum of a token's rows times their gates; zero where nothing was routed."""

    @staticmethod
    def forward(ctx: Any, rows_AD: Tensor, gate_TK: Tensor, order_A: Tensor, position_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_AD, gate_TK, order_A, position_TK)
        ctx.ops = ops_for(rows_AD)
        return ctx.ops.weighted_sum(rows_AD, gate_TK, position_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.ops.weighted_sum_backward(grads[0], *ctx.saved_tensors), None, None


@dataclass(frozen=True)
class Arriving:
    """Rows on their way to this rank. order, inverse: how to order them once they are here, and how to undo it."""

    rows: Tensor
    exchange: _Exchange | None = None
    order: Tensor | None = None
    inverse: Tensor | None = None

    def wait(self) -> Tensor:
        """The rows; differentiable."""
        if self.exchange is None:
            return self.rows
        rows = _Wait.apply(self.rows, self.exchange)
        return rows if self.order is None else _Permute.apply(rows, self.order, self.inverse)


def send_tokens(hidden_TD: Tensor, plan: DispatchPlan, group: dist.ProcessGroup | None) -> Arriving:
    """[T, D] -> [R, D]: begin to bring the rows for this rank's experts, which will stand sorted by expert."""
    rows_AD = _TokensToRows.apply(hidden_TD, plan.order_A, plan.position_TK)
    if group is None:
        return Arriving(rows_AD)
    exchange = _Exchange(plan.send_splits, plan.recv_splits, group)
    return Arriving(_Begin.apply(rows_AD, exchange), exchange, plan.arrival_R, plan.departure_R)


def return_tokens(rows_RD: Tensor, plan: DispatchPlan, group: dist.ProcessGroup | None) -> Arriving:
    """[R, D] -> [A, D]: begin to bring the rows back to the ranks of their tokens, in the order of ``plan.order_A``."""
    if group is None:
        return Arriving(rows_RD)
    if plan.arrival_R is not None:
        rows_RD = _Permute.apply(rows_RD, plan.departure_R, plan.arrival_R)
    exchange = _Exchange(plan.recv_splits, plan.send_splits, group)
    return Arriving(_Begin.apply(rows_RD, exchange), exchange)


def combine(rows_AD: Tensor, gate_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """Sum over a token's K experts of gate times what the expert adds: [T, D], zero where nothing was routed."""
    return _RowsToTokens.apply(rows_AD, gate_TK.to(rows_AD.dtype), plan.order_A, plan.position_TK)
