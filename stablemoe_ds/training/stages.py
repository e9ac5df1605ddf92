"""When stage 1 ends, and whether what is frozen then is any good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stablemoe_ds.config.rules import switch_step, two_stages
from stablemoe_ds.config.schema import PlateauConfig, RunConfig, StagesConfig


@dataclass(frozen=True)
class RoutingState:
    """Stage 1 at one record of the probe set.

    agreement: share of tokens for which both routers name the same expert. churn: share of probe tokens whose
    expert changed since the record before. load: largest max/mean load of any MoE layer.
    """

    step: int
    agreement: float
    churn: float
    load: float


class StageSchedule:
    """Says before which update routing is fixed: none for routers that only learn, the first for those that never do.

    What is fixed is the distilled router, or the table of a router that has nothing else.
    """

    def __init__(self, run: RunConfig) -> None:
        self._steps = run.schedule.steps
        self._plateau = run.stages.plateau if two_stages(run) else None
        self._at = switch_step(run)

    @property
    def planned(self) -> int | None:
        """First update of stage 2 where it is known beforehand."""
        return self._at

    def due(self, step: int, history: Sequence[RoutingState]) -> bool:
        """True if update ``step`` (from 0) is the first of stage 2. ``history``: records so far, oldest first."""
        if self._plateau is None:
            return self._at is not None and step >= self._at
        if step >= round(self._plateau.latest * self._steps):
            return True
        return step >= round(self._plateau.earliest * self._steps) and is_level(history, self._plateau)


def is_level(history: Sequence[RoutingState], plateau: PlateauConfig) -> bool:
    """True if over the last ``window`` updates agreement, churn and load all moved by ``tolerance`` at most.

    Load is compared relatively. At least three records must span the window.
    """
    if not history:
        return False
    newest = history[-1].step
    inside = [state for state in history if newest - state.step <= plateau.window]
    if len(inside) < 3 or newest - history[0].step < plateau.window:
        return False
    spreads = [
        max(values) - min(values)
        for values in ([s.agreement for s in inside], [s.churn for s in inside], [s.load for s in inside])
    ]
    spreads[2] /= max(s.load for s in inside)
    return max(spreads) <= plateau.tolerance


def switch_warnings(agreement: float, load: float, least_load: float, stages: StagesConfig) -> list[str]:
    """What is wrong with the table a switch is about to freeze, with the numbers; empty if nothing is.

    load: largest max/mean load of the frozen routes on the training text. least_load: what token frequencies force.
    """
    numbers = f"agreement {agreement:.1%}, max/mean load {load:.2f} (token frequencies allow {least_load:.2f})"
    found = []
    if agreement < stages.min_agreement:
        found.append(
            f"the distilled router has not learned the learned one: {numbers}; below stages.min_agreement "
            f"{stages.min_agreement:.0%}. A longer stage 1 or a larger moe.distill_weight helps."
        )
    if load > stages.max_load_excess * least_load:
        found.append(
            f"the frozen routes are out of balance: {numbers}; above stages.max_load_excess {stages.max_load_excess:g} "
            "times that. A longer stage 1 or a larger moe.balance_weight helps."
        )
    return found
