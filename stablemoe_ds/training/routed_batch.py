"""A micro-batch on its way into an update, with what is known of its routing beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.moe.plan import LayerPlan


@dataclass(frozen=True)
class RoutedBatch:
    """A micro-batch with all that is known of its routing before the step begins.

    fixed_LTK: int64 [L, T, K], None where the learned routers decide. plans: one a MoE layer, None where each
    layer has to make its own in the step.
    """

    batch: Batch
    fixed_LTK: Tensor | None = None  # noqa: N815
    plans: tuple[LayerPlan, ...] | None = None

    def to(self, device: torch.device | str) -> RoutedBatch:
        """The same on another device, copied without waiting where memory is pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> RoutedBatch:
        """The same in pinned memory, from where a GPU copies while it computes."""
        return self.map(Tensor.pin_memory)

    def map(self, change: Callable[[Tensor], Tensor]) -> RoutedBatch:
        """The same with every tensor in it changed."""
        fixed_LTK = None if self.fixed_LTK is None else change(self.fixed_LTK)
        plans = None if self.plans is None else tuple(tuple(part.map(change) for part in layer) for layer in self.plans)
        return RoutedBatch(self.batch.map(change), fixed_LTK, plans)
