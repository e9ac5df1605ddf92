"""What one forward call of the model consumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: B sequences of S tokens.

    ids: int64 [B, S], input token ids (any valid id where ``real`` is False).
    labels: int64 [B, S], the id that follows each input token.
    real: bool [B, S], False at padding: such tokens are not routed, counted or learned from.
    scored: bool [B, S], True where the prediction of ``labels`` counts in the loss.
    """

    ids: Tensor
    labels: Tensor
    real: Tensor
    scored: Tensor

    @property
    def real_T(self) -> Tensor:  # noqa: N802
        """bool [T]: ``real`` in the order in which the model lays tokens out, sequence first: t = s · B + b."""
        return self.real.transpose(0, 1).flatten()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device, copied without waiting where memory is pinned."""
        return self.map(lambda field: field.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with each field changed."""
        return Batch(*(change(field) for field in (self.ids, self.labels, self.real, self.scored)))
