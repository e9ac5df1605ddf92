"""Cross entropy over the vocabulary from logits in the model's dtype, a few rows at a time.

megatron-core makes an fp32 copy of all logits and keeps it for the backward pass: with a vocabulary of 32 768 that is
128 KiB a token, and the bf16 logits take 64. Here only a block of rows is fp32 at any time, and the gradient is
written over the logits. The vocabulary may be cut over tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

BLOCK = 2**22
"""fp32 logits at once: 16 MiB, which the cache of a GPU holds, and mostly that of a CPU."""


def cross_entropy(logits_TV: Tensor, target_T: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """fp32 [T]: -log softmax(logits)[target] in nats; differentiable once, and the logits are lost in doing so.

    logits_TV: of any float type; under tensor parallelism, this rank's part of the vocabulary. target_T: int64, ids of
    the whole vocabulary. group: the tensor-parallel ranks; None: there are no others.
    """
    loss_T: Tensor = _CrossEntropy.apply(logits_TV, target_T, group)
    return loss_T


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, target_T: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        tokens, here = logits_TV.shape
        first = 0 if group is None else here * dist.get_rank(group)
        mine_T = (target_T >= first) & (target_T < first + here)
        column_T = torch.where(mine_T, target_T - first, 0)
        chosen_T = logits_TV.gather(1, column_T[:, None])[:, 0].float() * mine_T
        total_T = torch.empty(tokens, device=logits_TV.device)  # log of the sum of exponentials
        for rows in _blocks(logits_TV):
            total_T[rows] = torch.logsumexp(logits_TV[rows].float(), 1)
        if group is not None:
            highest_T = total_T.clone()
            dist.all_reduce(highest_T, dist.ReduceOp.MAX, group=group)
            sums_2T = torch.stack([(total_T - highest_T).exp(), chosen_T])
            dist.all_reduce(sums_2T, group=group)
            total_T, chosen_T = highest_T + sums_2T[0].log(), sums_2T[1]
        ctx.save_for_backward(total_T, column_T, mine_T)
        ctx.logits_TV = logits_TV  # not saved as a tensor is: autograd would refuse that it is written to
        return total_T - chosen_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total_T, column_T, mine_T = ctx.saved_tensors
        logits_TV, ctx.logits_TV = ctx.logits_TV, None
        if logits_TV is None:
            raise RuntimeError("the backward pass has been here before and has written over the logits")
        (grad_T,) = grads
        for rows in _blocks(logits_TV):
            # softmax(logits) - one-hot(target), times the gradient of the loss
            block = logits_TV[rows].float().sub_(total_T[rows, None]).exp_().mul_(grad_T[rows, None])
            block.scatter_add_(1, column_T[rows, None], -(grad_T[rows] * mine_T[rows])[:, None])
            logits_TV[rows] = block
        return logits_TV, None, None


def _blocks(logits_TV: Tensor) -> Iterator[slice]:
    """Rows that together make at most a block, one at least."""
    tokens, here = logits_TV.shape
    size = max(1, BLOCK // here)
    return (slice(start, start + size) for start in range(0, tokens, size))
