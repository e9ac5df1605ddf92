"""A micro-batch for the tests of all routers: its residual stream, its ids, its padding.

The same numbers on every device; they lie on torch's default one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablemoe_ds.routing.routes import TokenView

S, B, D, N, VOCAB = 6, 5, 16, 4, 30
T = S * B


def stream(seed: int = 2, scale: float = 1.0) -> Tensor:
    """fp32 [T, D]."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(T, D, generator=random, device="cpu").to(torch.get_default_device()) * scale


def tokens(padding: bool = False) -> TokenView:
    """With ``padding``, about every third token is none."""
    random = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(VOCAB, (B, S), generator=random, device="cpu")
    real_T = torch.rand(T, generator=random, device="cpu") > (0.35 if padding else -1)
    here = torch.get_default_device()
    return TokenView(ids_BS.to(here), real_T.to(here))


def alone(counts: Tensor) -> Tensor:
    """The sum over ranks of a single process."""
    return counts
