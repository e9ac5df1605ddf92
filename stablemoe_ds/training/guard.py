"""Which updates are dropped because their numbers went wrong, and where in the model that began."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from stablemoe_ds.config.schema import FaultsConfig
from stablemoe_ds.routing.source import RouteSource
from stablemoe_ds.training.engine import Engine, tokens_of
from stablemoe_ds.training.routed_batch import RoutedBatch
from stablemoe_ds.training.update_figures import UpdateTotals

GRADIENT = "the gradient is not finite"
Spot = tuple[int, int, int, str]
"""Phase (0 forward, 1 backward), position in it, rank, name: the smallest is where it began."""


class Guard:
    """Counts what was dropped. Fed with figures that are equal on all ranks, it decides alike on all.

    dropped: updates in a row. reason: why, the last time. exhausted: those were too many. rollbacks: returns to the
    checkpoint that the run went back to last.
    """

    def __init__(self, faults: FaultsConfig) -> None:
        self._faults = faults
        self._losses: deque[float] = deque(maxlen=faults.spike_window)
        self.dropped, self.rollbacks, self.reason = 0, 0, ""
        self._returned_to = -1

    @property
    def exhausted(self) -> bool:
        return self.dropped >= self._faults.skip_limit

    @property
    def watches_losses(self) -> bool:
        """Whether the losses of every update have to be read. One that is not finite shows in the gradient."""
        return self._faults.spike_factor is not None

    def objection(self, totals: UpdateTotals) -> str | None:
        """Why an update with these losses should be dropped; None if it should not."""
        loss, auxiliary = totals.mean_loss, totals.mean_auxiliary
        if not math.isfinite(loss) or not math.isfinite(auxiliary):
            return f"the loss is {loss}" if not math.isfinite(loss) else f"an auxiliary loss is {auxiliary}"
        factor = self._faults.spike_factor
        if factor is None or len(self._losses) < self._faults.spike_window:
            return None
        usual = median(self._losses)
        return f"the loss is {loss:.4g}, usual was {usual:.4g}" if loss > factor * usual else None

    def keep(self, loss: float | None) -> None:
        """An update was made. loss: nats per token, None if it was not read."""
        self.dropped = 0
        if loss is not None:
            self._losses.append(loss)

    def drop(self, reason: str) -> None:
        """An update was dropped."""
        self.dropped, self.reason = self.dropped + 1, reason

    def go_back(self, step: int) -> bool:
        """The run should return to the checkpoint of ``step``. False if it has done so too often."""
        self.dropped, self.rollbacks = 0, self.rollbacks + 1 if step == self._returned_to else 1
        self._returned_to = step
        self._losses.clear()
        return self.rollbacks <= self._faults.rollback_limit


class DropWatch:
    """Says once that capacity drops most of what is routed: experts hardly learn then, and no loss says why."""

    HIGH = 0.5

    def __init__(self) -> None:
        self._said = False

    def warning(self, drop_rate: float | None) -> str | None:
        """What to say of an update. drop_rate: share of its (token, choice) pairs; None where there is no capacity."""
        if self._said or drop_rate is None or drop_rate <= self.HIGH:
            return None
        self._said = True
        return (
            f"capacity drops {drop_rate:.0%} of what is routed, and experts do not learn from it; a larger "
            "moe.capacity_factor (or null), a larger parallel.micro_batch, or a larger moe.balance_weight helps"
        )


def find_fault(engine: Engine, routed: Sequence[RoutedBatch], routes: RouteSource, seed: int) -> str:
    """Where the numbers of an update first were not finite: module or parameter, and rank. Collective.

    Runs the update once more, looking at every output and gradient, and changes nothing. Gradients are looked at
    before they are reduced, so that the rank they come from is known.
    """
    device, spots = engine.groups.world.device, list[Spot]()
    routed = [micro.to(device) for micro in routed]
    named = [(name, p) for name, p in engine.model.named_parameters() if p.requires_grad]
    rank = engine.groups.world.rank

    def look(name: str, _module: Any, _args: Any, output: Any) -> None:
        if not spots and any(_spoilt(part) for part in (output if isinstance(output, tuple) else (output,))):
            spots.append((0, seen[0], rank, f"output of {name or 'the model'}"))
        seen[0] += 1

    seen = [0]
    hooks = [module.register_forward_hook(partial(look, name)) for name, module in engine.model.named_modules()]
    try:
        for _, loss in engine.forward(engine.model, routed, tokens_of(routed), routes, seed):
            # Not backward(): DeepSpeed's hooks would reduce and keep these gradients.
            gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            # The last parameter of the model is the first whose gradient is known.
            bad = [i for i, gradient in enumerate(gradients) if gradient is not None and _spoilt(gradient)]
            spots += [(1, len(named) - bad[-1], rank, f"gradient of {named[bad[-1]][0]}")] if bad else []
    finally:
        for hook in hooks:
            hook.remove()
    everyone: list[Any] = [None] * engine.groups.world.size
    dist.all_gather_object(everyone, min(spots, default=None))
    found: list[Spot] = [spot for spot in everyone if spot is not None]
    if not found:
        return "all is finite when the update is run again: a passing fault of a device or its memory?"
    _, _, where, name = min(found)
    return f"{name} on rank {where}"


def _spoilt(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())
