"""The figures of updates, fetched from the device when they are written down and at no other time."""

from __future__ import annotations

from typing import Any

from stablemoe_ds.config.costs import flops_per_token
from stablemoe_ds.config.resolved import ResolvedRun
from stablemoe_ds.distributed.groups import World
from stablemoe_ds.training.callback import Callback, RunState, Update
from stablemoe_ds.training.engine import Engine
from stablemoe_ds.training.guard import DropWatch
from stablemoe_ds.training.reporter import Reporter
from stablemoe_ds.training.throughput import peak_flops
from stablemoe_ds.training.update_figures import UpdateTotals


class UpdateLog(Callback):
    """A line every ``logging.every`` updates; its speed is of all updates since the line before.

    peak: what MFU is relative to: FLOP/s of one device, and where that number comes from.
    """

    def __init__(
        self, resolved: ResolvedRun, world: World, state: RunState, engine: Engine, reporter: Reporter
    ) -> None:
        self._run, self._plan, self._state = resolved.run, resolved.batch, state
        self._engine, self._reporter = engine, reporter
        self.peak = peak_flops(world.device, self._run.precision.dtype)
        self._processes, self._flops = world.size, flops_per_token(self._run)
        self._drops = DropWatch()
        self.begin()

    def begin(self) -> None:
        self._updates, self._seconds = 0, 0.0

    def after_update(self, update: Update) -> None:
        self._updates, self._seconds = self._updates + 1, self._seconds + update.seconds
        steps = self._run.schedule.steps
        if update.step % self._run.logging.every and not update.ends:
            self._reporter.display.advance(update.step)
            return
        figures = self._figures(update.figures.totals(), update.lr) | self._speed()
        self._reporter.display.step(update.step, steps, figures)
        self._reporter.log("train", update.step, figures)
        if warning := self._drops.warning(figures["drop_rate"]):
            self._reporter.say(f"WARNING: update {update.step}: {warning}", "bold red")
        self.begin()

    def _figures(self, totals: UpdateTotals, lr: float) -> dict[str, Any]:
        moe, stage = self._run.moe, self._state.progress.stage
        learned = stage == 1 and bool(totals.counts_LN)
        distilled = learned and moe.facts.distilled
        real = max(1, totals.real)
        assigned = sum(map(sum, totals.counts_LN))
        return {
            "stage": stage,
            "tokens_read": self._state.progress.position.tokens,
            "loss": totals.mean_loss,
            "balance_loss": totals.balance / real if learned and moe.balance_weight else None,
            "distill_loss": totals.distill / real if distilled else None,
            "lr": lr,
            "grad_norm": self._engine.gradient_norm(),
            "agreement": totals.agree / real if distilled else None,
            "load": totals.loads,
            "drop_rate": totals.dropped / max(1, assigned) if moe.capacity_factor is not None else None,
            "unserved_rate": totals.unserved / (real * len(totals.counts_LN)) if totals.unserved else None,
        }

    def _speed(self) -> dict[str, float]:
        tokens_per_second = self._updates / self._seconds * self._plan.tokens_per_step
        peak = self.peak[0] * self._processes
        return {"tokens_per_second": tokens_per_second, "mfu": tokens_per_second * self._flops / peak}
