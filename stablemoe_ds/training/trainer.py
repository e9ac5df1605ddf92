"""A run from start to end: two stages, validation, checkpoints, and a clean stop at any moment."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from stablemoe_ds.config.batch import batch_plan
from stablemoe_ds.config.costs import flops_per_token
from stablemoe_ds.config.rules import check, with_vocabulary
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.moe.plan import RoutedBatch
from stablemoe_ds.routing.fixed import FixedRouting, TableRouting
from stablemoe_ds.routing.table import RoutingTable, least_load
from stablemoe_ds.training.checkpoint import Checkpoint, Progress, newest_checkpoint, restore, save
from stablemoe_ds.training.data import EvalSet, RunData, token_counts
from stablemoe_ds.training.engine import Engine, StepSums
from stablemoe_ds.training.groups import Groups, World
from stablemoe_ds.training.observer import Observer
from stablemoe_ds.training.optimizer import learning_rate
from stablemoe_ds.training.planner import Planner
from stablemoe_ds.training.session import check_tokenizer, run_report, write_report
from stablemoe_ds.training.stages import StageSchedule, switch_warnings
from stablemoe_ds.training.throughput import peak_flops

PROBES_PER_RUN = 50


class Trainer:
    """One process's part in a run. Build it on every rank, then call :meth:`fit`."""

    def __init__(self, run: RunConfig, world: World) -> None:
        """Raises UserError for a configuration or data that cannot work, before anything is written."""
        check(run, world.size)
        tokenizer = Tokenizer(run.data.tokenizer) if run.data.tokenizer else None
        run = with_vocabulary(run, tokenizer.vocab_size if tokenizer else run.model.vocab_size or 0)
        self.run, self.world, self.tokenizer = run, world, tokenizer
        self.fingerprint = tokenizer.fingerprint if tokenizer else ""
        self.plan = batch_plan(run, world.size)
        self.groups = Groups(world, run.parallel.tensor, run.parallel.expert)
        self.data = RunData(run, self.plan, self.groups, tokenizer)
        self.token_counts = token_counts(run.data.train, tokenizer, run.model.vocab_size or 0)
        self.valid = self.data.eval_set(run.data.valid, None)
        quick = run.logging.eval_tokens
        self.valid_quick = self.data.eval_set(run.data.valid, quick) if quick else self.valid
        self.test = self.data.eval_set(run.data.test, None)
        self.model = StableMoEGPT(run, run.model.vocab_size or 0, self.groups.placement)
        self.engine = Engine(run, self.plan, self.groups, self.model)
        probe = self.data.probe() if self.model.moe_layers else []
        self.observer = Observer(run, self.groups, self.model, probe)
        self.say = self.observer.display.say
        self.schedule = StageSchedule(run)
        self.progress = Progress()
        self.routing: FixedRouting | None = None
        self.peak, _ = peak_flops(world.device, run.precision.dtype)
        self.flops_per_token = flops_per_token(run)
        self._stop = False
        self._closing = ExitStack()

    def fit(self) -> bool:
        """Train to the end. Returns False if the run was asked to stop and left a checkpoint."""
        self._resume()
        self._announce()
        steps = self.run.schedule.steps
        if self.progress.step >= steps and (Path(self.run.directory) / "report.json").exists():
            self.observer.close()
            self.say(f"this run is finished; its report is in {self.run.directory}")
            return True
        with self._stopping_on_signals():
            self._closing.callback(self.observer.close)
            with self._closing:
                self.observer.display.start(self.run.name, self.progress.step, steps)
                if self.progress.step < steps and not self._train(steps):
                    self.observer.display.close()
                    where = f"asked to stop: saved at step {self.progress.step}"
                    self.say(f"{where}; the same command continues the run", "bold")
                    return False
                self.observer.display.close()
                self._finish()
                return True

    def _train(self, steps: int) -> bool:
        """Update until the end of the run; False if it was asked to stop before."""
        run, observer = self.run, self.observer
        probe_every = run.logging.probe_every or max(1, steps // PROBES_PER_RUN)
        updates, seconds = 0, 0.0
        loader = iter(self.data.train_loader(self.progress.samples))
        self._switch_if_due()
        feed = self._feed(loader)
        while self.progress.step < steps:
            began = time.perf_counter()
            sums, figures = self._update(next(feed))
            updates, seconds = updates + 1, seconds + time.perf_counter() - began
            figures |= self._speed(updates / seconds)
            done = self.progress.step
            last, stop = done == steps, sums.stop_requested
            logged = done % run.logging.every == 0 or last or stop
            observer.display.step(done, steps, figures, logged)
            if logged:
                observer.log("train", done, figures)
                updates, seconds = 0, 0.0
            if done % probe_every == 0 or last:
                observer.routing_state(done, self.routing)
            if run.logging.eval_every and done % run.logging.eval_every == 0 and not last:
                self._validate(self.valid_quick)
            # Before the checkpoint, so that a run resumed here does not switch once more.
            if not last and self._switch_if_due():
                feed = self._feed(loader)
            if (run.checkpoint.every and done % run.checkpoint.every == 0) or last or stop:
                self._save()
            if stop and not last:
                return False
        return True

    def _feed(self, loader: Iterator[list[Batch]]) -> Iterator[list[RoutedBatch]]:
        """What the loader has still to give; planned ahead once routing is a table."""
        table = self._table()
        if table is None:
            return ([RoutedBatch(batch) for batch in step] for step in loader)
        planner = Planner(loader, table, self.groups, self.run.parallel.timeout_minutes)
        self._closing.callback(planner.close)
        return iter(planner)

    def _update(self, batches: list[RoutedBatch]) -> tuple[StepSums, dict[str, Any]]:
        """One update, and its figures for the log. Raises UserError if the loss or the gradient is not finite."""
        step = self.progress.step
        lr = learning_rate(step, self.run.optimizer, self.run.schedule)
        self.engine.set_learning_rate(lr)
        sums = self.engine.accumulate(batches, self.routing, self.run.seed * 1_000_003 + step, self._stop)
        if not math.isfinite(sums.loss + sums.balance + sums.distill):
            raise UserError(self._diverged(f"the loss is {sums.loss / max(1, sums.scored)}"))
        norm = self.engine.update()
        # At fp16 an overflow is expected now and then: DeepSpeed skips the update and lowers the loss scale.
        if not math.isfinite(norm) and self.run.precision.dtype != "fp16":
            raise UserError(self._diverged(f"the gradient norm is {norm}"))
        samples = self.progress.samples + self.plan.sequences_per_step
        self.progress = replace(self.progress, step=step + 1, samples=samples)
        learned = self.progress.stage == 1 and bool(sums.counts_LN)
        assigned = sum(map(sum, sums.counts_LN))
        return sums, {
            "stage": self.progress.stage,
            "loss": sums.loss / max(1, sums.scored),
            "balance_loss": sums.balance / max(1, sums.real) if learned else None,
            "distill_loss": sums.distill / max(1, sums.real) if learned else None,
            "lr": lr,
            "grad_norm": norm,
            "agreement": sums.agree / max(1, sums.real) if learned else None,
            "load": sums.loads,
            "drop_rate": sums.dropped / max(1, assigned) if self.run.moe.capacity_factor is not None else None,
        }

    def _speed(self, updates_per_second: float) -> dict[str, float]:
        tokens_per_second = updates_per_second * self.plan.tokens_per_step
        achieved = tokens_per_second * self.flops_per_token
        return {"tokens_per_second": tokens_per_second, "mfu": achieved / (self.peak * self.world.size)}

    def _diverged(self, what: str) -> str:
        newest, optimizer = newest_checkpoint(self.run.directory), self.run.optimizer
        return (
            f"update {self.progress.step + 1}: {what}; newest good checkpoint: {newest or 'none'}. "
            f"Try a lower optimizer.lr ({optimizer.lr:g}) or a smaller optimizer.clip ({optimizer.clip:g})"
        )

    def _switch_if_due(self) -> bool:
        """Begin stage 2 if it is time: validate both routers, freeze the distilled one, and say if that is bad."""
        if self.progress.stage == 2 or not self.schedule.due(self.progress.step, self.observer.history):
            return False
        step, moe = self.progress.step, self.run.moe
        self._validate(self.valid)
        before = self.observer.routing_state(step, None, record=False)
        self.engine.freeze_distilled()
        self.routing = self.model.frozen_routing(self.fingerprint)
        self.progress = replace(self.progress, stage=2, switched_at=step)
        after = self.observer.routing_state(step, self.routing)
        table, least = self._table(), least_load(self.token_counts, moe.experts, moe.top_k)
        agreement = before.agreement if before else 0.0
        # Routers that look further than the id have no table to count with: the probe tells their load.
        load = float(table.load(self.token_counts).max()) if table else after.load if after else 0.0
        sha256 = table.sha256 if table else None
        switch = {"agreement": agreement, "load": load, "least_load": least, "table_sha256": sha256}
        self.observer.log("switch", step, switch)
        frozen = f"table {table.sha256[:12]}" if table else f"{moe.distilled.kind} routers"
        self.say(
            f"stage 2 begins with update {step + 1}: routing frozen into {frozen}; agreement {agreement:.1%}, "
            f"max/mean load {load:.2f} (token frequencies allow {least:.2f})",
            "bold green",
        )
        for warning in switch_warnings(agreement, load, least, self.run.stages):
            self.say(f"WARNING: {warning}", "bold red")
        return True

    def _table(self) -> RoutingTable | None:
        return self.routing.table if isinstance(self.routing, TableRouting) else None

    def _validate(self, data: EvalSet | None, kind: Any = "valid") -> None:
        """In stage 1 with the learned router and, if a switch is to come, with what it would freeze now."""
        two = self.progress.stage == 1 and self.model.moe_layers and not self.run.stages.never
        distilled = self.model.frozen_routing(self.fingerprint) if two else None
        self.observer.validate(self.progress.step, data, self.routing, distilled, kind)

    def _resume(self) -> None:
        """Continue from the newest checkpoint if there is one, else begin with an empty history."""
        newest = newest_checkpoint(self.run.directory) if self.run.checkpoint.resume else None
        if newest is not None:
            checkpoint = Checkpoint.open(newest)
            check_tokenizer(checkpoint, self.tokenizer)
            restore(self.engine, checkpoint)
            self.progress = checkpoint.progress
            if self.progress.stage == 2:
                self.engine.freeze_distilled()
                self.routing = self.model.frozen_routing(self.fingerprint)
                saved, made = checkpoint.table(), self._table()
                if saved and made and saved.sha256 != made.sha256:
                    raise UserError(
                        f"checkpoint {newest}: its routing table {saved.sha256[:12]} is not the one its weights give "
                        f"({made.sha256[:12]}): it is damaged; use an older one"
                    )
        self.observer.begin(self.progress.step if newest is not None else None)

    def _save(self) -> None:
        table = self._table()
        path = save(self.engine, self.progress, self.fingerprint, table)
        if self.world.is_main and table is not None:
            table.save(Path(self.run.directory) / "routing_table.safetensors")
        self.say(f"step {self.progress.step}: saved {path}", "dim")

    def _finish(self) -> None:
        """Final figures, and the report if there is a tokenizer to name pieces with."""
        self._validate(self.valid)
        self._validate(self.test, "test")
        if self.world.is_main and self.tokenizer:
            for path in write_report(run_report(Checkpoint.open(self.run.directory)), Path(self.run.directory)):
                self.say(f"wrote {path}")

    def _announce(self) -> None:
        run, plan = self.run, self.plan
        planned = self.schedule.planned
        two = f"stage 2 from update {planned + 1}" if planned is not None else "stage 2 when routing settles"
        stages = "one stage" if run.stages.never or run.moe.router == "dense" else two
        self.say(
            f"{run.name}: {self.world.size} x {self.world.device.type}, data {plan.data_parallel}, "
            f"tensor {run.parallel.tensor}, expert {run.parallel.expert}, ZeRO {run.parallel.zero_stage}, "
            f"{run.precision.dtype}",
            "bold",
        )
        self.say(
            f"{plan.tokens_per_step:,} tokens an update = {plan.data_parallel} data ranks x {plan.accumulation} "
            f"micro-batches x {plan.micro_batch} sequences x {run.data.sequence_length} tokens; "
            f"{run.schedule.steps:,} updates, {stages}"
        )
        if self.progress.step:
            self.say(f"continuing after update {self.progress.step}, in stage {self.progress.stage}", "bold")

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask the run to stop after the update it is at; a second Ctrl-C ends it at once."""

        def ask(number: int, _frame: Any) -> None:
            if self._stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop = True

        handlers = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def train(run: RunConfig, world: World) -> bool:
    """Train a run in this process; see :class:`Trainer`."""
    return Trainer(run, world).fit()
