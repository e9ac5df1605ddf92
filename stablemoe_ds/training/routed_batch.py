"""A micro-batch on its way into an update, with what is known of its routing beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.moe.plan import LayerPlan
from stablemoe_ds.moe.routing_pass import view_of
from stablemoe_ds.routing.routes import KnownRoutes
from stablemoe_ds.routing.source import RouteSource, routes_of


@dataclass(frozen=True)
class RoutedBatch:
    """A micro-batch with all that is known of its routing before the step begins.

    known: routes that were looked up; none where that is left to the step. plans: by block, of the layers with such
    routes; the others make theirs in the step.
    """

    batch: Batch
    known: KnownRoutes = field(default_factory=dict)
    plans: Mapping[int, LayerPlan] = field(default_factory=dict)

    def follow(self, routes: RouteSource) -> KnownRoutes:
        """Its routes: those that were looked up, or else what ``routes`` says."""
        return self.known or routes_of(view_of(self.batch), routes)

    def to(self, device: torch.device | str) -> RoutedBatch:
        """The same on another device, copied without waiting where memory is pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> RoutedBatch:
        """The same in pinned memory, from where a GPU copies while it computes."""
        return self.map(Tensor.pin_memory)

    def map(self, change: Callable[[Tensor], Tensor]) -> RoutedBatch:
        """The same with every tensor in it changed."""
        known = {block: change(expert_TK) for block, expert_TK in self.known.items()}
        plans = {block: tuple(part.map(change) for part in layer) for block, layer in self.plans.items()}
        return RoutedBatch(self.batch.map(change), known, plans)
