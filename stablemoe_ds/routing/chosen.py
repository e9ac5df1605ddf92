"""Affinity of tokens to the experts that serve them, where these are known: no score for any other is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stablemoe_ds.ops.rows import ops_for


class _ChosenAffinity(Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, centroids_ND: Tensor, chosen_TK: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_TD, centroids_ND, chosen_TK)
        ctx.ops = ops_for(hidden_TD)
        return ctx.ops.dots(hidden_TD, centroids_ND, chosen_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, centroids_ND, chosen_TK = ctx.saved_tensors
        grad_hidden_TD = ctx.ops.weighted_sum(centroids_ND, grads[0], chosen_TK, hidden_TD.dtype)
        grad_rows_TKD = hidden_TD[:, None].to(centroids_ND.dtype) * grads[0][..., None]
        # What an embedding's backward pass uses: unlike index_add it adds in the same order every time on a GPU, too.
        grad_centroids_ND = torch.ops.aten.embedding_dense_backward(
            grad_rows_TKD, chosen_TK, centroids_ND.shape[0], -1, False
        )
        return grad_hidden_TD, grad_centroids_ND, None


def chosen_affinity(hidden_TD: Tensor, centroids_ND: Tensor, chosen_TK: Tensor) -> Tensor:
    """[T, K]: <E_i, h_t> for the experts i that are chosen for token t, in the type of the centroids.

    hidden_TD: any float type, and its gradient the same. chosen_TK: int64 in 0..N-1.
    """
    return _ChosenAffinity.apply(hidden_TD, centroids_ND, chosen_TK)
