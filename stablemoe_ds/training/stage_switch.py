"""The switch from stage 1 to stage 2: routing is frozen, and the run says what it will follow from then on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.routing.source import FixedSource, RouteMaker
from stablemoe_ds.tables.table import least_load
from stablemoe_ds.training.callback import Callback, RunState, Update
from stablemoe_ds.training.engine import Engine
from stablemoe_ds.training.feed import Feed
from stablemoe_ds.training.probing import Probing
from stablemoe_ds.training.reporter import Reporter
from stablemoe_ds.training.stages import RoutingState, StageSchedule, switch_warnings
from stablemoe_ds.training.validation import Validation


class StageSwitch(Callback):
    """Freezes the routing when it is time. A router that learns nothing follows its table from the first update."""

    def __init__(
        self,
        run: RunConfig,
        state: RunState,
        engine: Engine,
        feed: Feed,
        routes: RouteMaker,
        token_counts: NDArray[np.int64],
        reporter: Reporter,
        *,
        probing: Probing,
        validation: Validation,
    ) -> None:
        """``token_counts``: int64 [V], how often the training text has each id."""
        self._run, self._state, self._engine, self._feed = run, state, engine, feed
        self._maker, self._token_counts, self._reporter = routes, token_counts, reporter
        self._probing, self._validation = probing, validation
        self.schedule = StageSchedule(run)

    def begin(self) -> None:
        self._switch_if_due()

    def after_update(self, update: Update) -> None:
        if not update.last:
            self._switch_if_due()

    def _switch_if_due(self) -> None:
        """Before a checkpoint is saved, so that a run which continues from it does not switch once more."""
        progress = self._state.progress
        if progress.stage == 2 or not self.schedule.due(progress.step, self._probing.history):
            return
        frozen = self._maker.frozen(self._state.routes.table, progress.step)
        before = None
        if not self._run.moe.facts.fixed:
            self._validation.before_switch(frozen)
            before = self._probing.look(self._state.routes)
        self._engine.freeze_distilled()
        self._state.routes = frozen
        self._state.progress = replace(progress, stage=2, switched_at=progress.step)
        after = self._probing.record(frozen)
        if self._run.moe.facts.fixed:
            self._say_fixed(self._load(frozen, after), frozen)
        else:
            self._say_switched(before.agreement if before else 0.0, self._load(frozen, after), frozen)
        self._feed.follow(frozen)

    def _load(self, frozen: FixedSource, after: RoutingState | None) -> float:
        """max/mean. Routers that look further than the id have no table to count with: the probe has their load."""
        if frozen.table is not None:
            return float(frozen.table.expert_load(self._token_counts).max())
        return after.load if after else 0.0

    def _say_fixed(self, load: float, frozen: FixedSource) -> None:
        sha256 = frozen.table.sha256 if frozen.table else ""
        text = f"routing is fixed from the start: table {sha256[:12]}, max/mean load {load:.2f}"
        self._reporter.say(text, "bold green")

    def _say_switched(self, agreement: float, load: float, frozen: FixedSource) -> None:
        """agreement: of the learned and the distilled router on the probe's tokens."""
        moe, step, table = self._run.moe, self._state.progress.step, frozen.table
        least = least_load(self._token_counts, moe.experts, moe.top_k)
        sha256 = table.sha256 if table else None
        switch = {"agreement": agreement, "load": load, "least_load": least, "table_sha256": sha256}
        self._reporter.log("switch", step, switch)
        what = f"table {table.sha256[:12]}" if table else f"{moe.distilled.kind} routers"
        self._reporter.say(
            f"stage 2 begins with update {step + 1}: routing frozen into {what}; agreement {agreement:.1%}, "
            f"max/mean load {load:.2f} (token frequencies allow {least:.2f})",
            "bold green",
        )
        for warning in switch_warnings(agreement, load, least, self._run.stages):
            self._reporter.say(f"WARNING: {warning}", "bold red")
