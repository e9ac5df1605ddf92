"""What the ways to compute a sublayer of the experts have in common: its weights and its activation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from stablemoe_ds.ops.rows import swiglu


class SublayerWeights(NamedTuple):
    """W2 act(W1 (scale x + shift) + b1) + b2, each stacked over E experts, or those of one expert.

    scale, shift: [E, D], the affine part of each expert's norm. w1: [E, F, D], or [E, 2F, D] for swiglu (gate half
    first). b1: [E, F]. w2: [E, D, F]. b2: [E, D]. Both biases or none.
    """

    scale: Tensor
    shift: Tensor | None
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None

    def each(self) -> Iterator[SublayerWeights]:
        """Views of one expert after another, without the leading dimension."""
        unbound = (repeat(None) if weight is None else weight.unbind() for weight in self)
        return map(SublayerWeights._make, zip(*unbound, strict=False))


def activate(name: str, inner: Tensor) -> Tensor:
    """relu, gelu or swiglu of [R, F], or of [R, 2F] for swiglu."""
    if name == "swiglu":
        return swiglu(inner)
    return F.relu(inner) if name == "relu" else F.gelu(inner)
