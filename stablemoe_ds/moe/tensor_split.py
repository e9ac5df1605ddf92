"""Under tensor parallelism every rank of the group holds the same tokens: each carries a share to the experts."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def share_of(tokens: int, rank: int, ranks: int) -> tuple[int, int, int]:
    """(start, end, rows of a full share) of a rank's share of ``tokens`` rows."""
    rows = -(-tokens // ranks)
    return min(rank * rows, tokens), min((rank + 1) * rows, tokens), rows


def _share(tokens: int, group: dist.ProcessGroup) -> tuple[int, int, int]:
    return share_of(tokens, dist.get_rank(group), dist.get_world_size(group))


def _gather(share: Tensor, tokens: int, group: dist.ProcessGroup) -> Tensor:
    _, _, rows = _share(tokens, group)
    padded = share.new_zeros(rows, *share.shape[1:])
    padded[: share.shape[0]] = share
    out = share.new_empty(rows * dist.get_world_size(group), *share.shape[1:])
    dist.all_gather_into_tensor(out, padded, group=group)
    return out[:tokens]


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.tokens, ctx.group = full.shape[0], group
        start, end, _ = _share(full.shape[0], group)
        return full[start:end].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grads[0], ctx.tokens, ctx.group), None


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, tokens: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(share, tokens, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        start, end, _ = _share(grads[0].shape[0], ctx.group)
        return grads[0][start:end].contiguous(), None, None


def split_tokens(full: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T, ...] -> this rank's contiguous share of the rows; the gradient is gathered from all ranks."""
    return full if group is None else _Split.apply(full, group)


def join_tokens(share: Tensor, tokens: int, group: dist.ProcessGroup | None) -> Tensor:
    """Shares of all ranks -> [T, ...] on every rank; the gradient, equal on all ranks, is cut again."""
    return share if group is None else _Join.apply(share, tokens, group)
