"""What the ways to compute a sublayer of the experts have in common: its weights and its activation."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class SublayerWeights(NamedTuple):
    """W2 act(W1 (scale x + shift) + b1) + b2, each stacked over E experts.

    scale, shift: the affine part of each expert's norm. w1: [E, F, D], or [E, 2F, D] for swiglu (gate half first).
    Both biases or none.
    """

    scale_ED: Tensor  # noqa: N815
    shift_ED: Tensor | None  # noqa: N815
    w1_EFD: Tensor  # noqa: N815
    b1_EF: Tensor | None  # noqa: N815
    w2_EDF: Tensor  # noqa: N815
    b2_ED: Tensor | None  # noqa: N815


def activate(name: str, inner: Tensor) -> Tensor:
    """relu, gelu or swiglu of [R, F], or of [R, 2F] for swiglu."""
    if name == "swiglu":
        gate, value = inner.chunk(2, dim=-1)
        return F.silu(gate) * value
    return F.relu(inner) if name == "relu" else F.gelu(inner)
