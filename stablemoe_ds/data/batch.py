"""What one forward call of the model consumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: B sequences of S tokens, or S consecutive tokens of each of B longer sequences.

    ids: int64 [B, S], input token ids (any valid id where ``real`` is False).
    labels: int64 [B, S], the id that follows each input token.
    real: bool [B, S], False at padding: such tokens are not routed, counted or learned from.
    scored: bool [B, S], True where the prediction of ``labels`` counts in the loss.
    whole: int64 [B, more than S], the ids of the sequences that this batch is a part of, under sequence parallelism;
    None: the batch has all of them. first: where in ``whole`` this part begins.
    """

    ids: Tensor
    labels: Tensor
    real: Tensor
    scored: Tensor
    whole: Tensor | None = None
    first: int = 0

    @property
    def whole_ids(self) -> Tensor:
        """int64 [B, S or more]: ids of the whole sequences."""
        return self.ids if self.whole is None else self.whole

    def part(self, rank: int, ranks: int) -> Batch:
        """What one of ``ranks`` ranks has of the sequences: as many consecutive tokens as every other.

        Raises ValueError if the sequences cannot be cut evenly.
        """
        if ranks == 1:
            return self
        if self.ids.shape[1] % ranks:
            raise ValueError(f"sequences of {self.ids.shape[1]} tokens cannot be cut over {ranks} ranks")
        length = self.ids.shape[1] // ranks
        here = slice(rank * length, (rank + 1) * length)
        return replace(self.map(lambda field: field[:, here]), whole=self.ids, first=here.start)

    @property
    def real_T(self) -> Tensor:  # noqa: N802
        """bool [T]: ``real`` in the order in which the model lays tokens out, sequence first: t = s · B + b."""
        return self.real.transpose(0, 1).flatten()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device, copied without waiting where memory is pinned."""
        return self.map(lambda field: field.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with each field changed."""
        ids, labels, real, scored = (change(field) for field in (self.ids, self.labels, self.real, self.scored))
        return Batch(ids, labels, real, scored, None if self.whole is None else change(self.whole), self.first)
