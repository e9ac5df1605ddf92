"""A micro-batch for the tests of all routers: its residual stream, its ids, its padding."""

from __future__ import annotations

import torch
from torch import Tensor

from stablemoe_ds.routing.routes import TokenView

S, B, D, N, VOCAB = 6, 5, 16, 4, 30
T = S * B


def stream(seed: int = 2, scale: float = 1.0) -> Tensor:
    """fp32 [T, D]."""
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed)) * scale


def tokens(padding: bool = False) -> TokenView:
    """With ``padding``, about every third token is none."""
    random = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(VOCAB, (B, S), generator=random)
    return TokenView(ids_BS, torch.rand(T, generator=random) > (0.35 if padding else -1))


def alone(counts: Tensor) -> Tensor:
    """The sum over ranks of a single process."""
    return counts
