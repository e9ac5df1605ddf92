"""A run from start to end: two stages, validation, checkpoints, and a clean stop at any moment."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from stablemoe_ds.checkpoint.reader import Checkpoint, Progress
from stablemoe_ds.checkpoint.restore import Found, find_checkpoint, restore
from stablemoe_ds.checkpoint.saver import Saved, Saver
from stablemoe_ds.config.batch import batch_plan
from stablemoe_ds.config.costs import flops_per_token
from stablemoe_ds.config.difference import differences
from stablemoe_ds.config.messages import show_both
from stablemoe_ds.config.rules import check, two_stages, with_vocabulary
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.run_data import EvalSet, RunData, token_counts
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.distributed.faults import Place, at_most, naming_faults
from stablemoe_ds.distributed.groups import Groups, World
from stablemoe_ds.distributed.rendezvous import agree_on_run
from stablemoe_ds.distributed.signals import StopRequest
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.run_report import run_report, write_report
from stablemoe_ds.evaluation.trained_model import check_tokenizer
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.fixed import FixedRouting, TableRouting
from stablemoe_ds.run_directory.progress import reported_steps
from stablemoe_ds.tables.table import RoutingTable, least_load
from stablemoe_ds.training.engine import Engine, StepSums
from stablemoe_ds.training.guard import Guard, find_fault
from stablemoe_ds.training.observer import Observer
from stablemoe_ds.training.optimizer import learning_rate
from stablemoe_ds.training.planner import Planner
from stablemoe_ds.training.routed_batch import RoutedBatch
from stablemoe_ds.training.stages import StageSchedule, switch_warnings
from stablemoe_ds.training.throughput import peak_flops

PROBES_PER_RUN = 50
GRADIENT = "the gradient is not finite"


class Trainer:
    """One process's part in a run. Build it on every rank, then call :meth:`fit`."""

    def __init__(
        self, run: RunConfig, world: World, stop: StopRequest | None = None, place: Place | None = None
    ) -> None:
        """Raises UserError for a configuration or data that cannot work, before anything is written.

        stop: a request that may have come already. place: kept up to date for whoever wants to know where the run is.
        """
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
        self.saver = Saver(self.engine, self.fingerprint, self._tell_saved)
        self.schedule, self.guard = StageSchedule(run), Guard(run.faults)
        self.progress, self.saved_step = Progress(), 0
        self.routing: FixedRouting | None = None
        self.peak, _ = peak_flops(world.device, run.precision.dtype)
        self.flops_per_token = flops_per_token(run)
        self.stop, self.place = stop or StopRequest(), place or Place()
        self._closing = ExitStack()
        self._planner: Planner | None = None

    def fit(self) -> bool:
        """Train to the end. Returns False if the run was asked to stop and left a checkpoint."""
        self._announce(self._resume())
        steps = self.run.schedule.steps
        if self.progress.step >= steps and reported_steps(Path(self.run.directory)) >= steps:
            self.observer.close()
            self.say(f"this run is finished; its report is in {self.run.directory}")
            return True
        with self.stop.on(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._closing.callback(self.observer.close)
            self._closing.callback(self.saver.close)
            with self._closing:
                self.observer.display.start(self.run.name, self.progress.step, steps)
                if self.progress.step < steps and not self._train(steps):
                    self.observer.display.close()
                    where = f"asked to stop: saved at step {self.saved_step}"
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
        loader = self._loader()
        self._switch_if_due()
        feed = self._feed(loader)
        while self.progress.step < steps:
            began = time.perf_counter()
            self.place.enter(self.progress.step + 1)
            with at_most(self.world.timeout.total_seconds(), "reading the next batch"):
                batches = next(feed)
            sums, figures = self._update(batches)
            self.saver.poll()
            if self.guard.exhausted:
                self._go_back()
                loader = self._loader()
                feed, updates, seconds = self._feed(loader), 0, 0.0
                continue
            updates, seconds = updates + 1, seconds + time.perf_counter() - began
            figures |= self._speed(updates / seconds)
            done = self.progress.step
            # Not after a dropped update, which is not saved: it is asked again, and answered, when one is kept.
            last, stop = done == steps, sums.stop_requested and not self.guard.dropped
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
                self._save(last or stop)
            if stop and not last:
                return False
        return True

    def _loader(self) -> Iterator[list[Batch]]:
        """Batches from here to the end of the run.

        If a run that went back has skipped data, the beginning of the order stands in for it at the end.
        """
        missing = self.run.schedule.steps - self.progress.step
        total = self.run.schedule.steps * self.plan.sequences_per_step
        loaders = [self.data.train_loader(self.progress.samples % total)]
        if len(loaders[0]) < missing:
            loaders.append(self.data.train_loader(0))
        return (step for loader in loaders for step in loader)

    def _feed(self, loader: Iterator[list[Batch]]) -> Iterator[list[RoutedBatch]]:
        """What the loader has still to give; planned ahead once routing is a table."""
        table = self._table()
        if table is None:
            return ([RoutedBatch(batch) for batch in step] for step in loader)
        self._planner = Planner(loader, table, self.groups, self.run.parallel)
        self._closing.callback(self._planner.close)
        return iter(self._planner)

    def _update(self, batches: list[RoutedBatch]) -> tuple[StepSums, dict[str, Any]]:
        """One update, and its figures for the log. It is dropped if its numbers went wrong."""
        step = self.progress.step
        lr = learning_rate(step, self.run.optimizer, self.run.schedule)
        self.engine.set_learning_rate(lr)
        seed = self.run.seed * 1_000_003 + step
        sums = self.engine.accumulate(batches, self.routing, seed, self.stop.asked)
        loss, auxiliary = sums.loss / max(1, sums.scored), (sums.balance + sums.distill) / max(1, sums.real)
        objection = self.guard.objection(loss, auxiliary)
        norm = self.engine.update(keep=objection is None)
        # At fp16 an overflow is expected now and then: DeepSpeed skips the update and lowers the loss scale.
        if objection is None and not math.isfinite(norm) and self.run.precision.dtype != "fp16":
            objection = GRADIENT
        if objection is None:
            self.guard.keep(loss)
            self.engine.teach_routers(sums)
        else:
            self.guard.drop(objection)
            finite = math.isfinite(loss + auxiliary) and objection != GRADIENT
            where = "" if finite else find_fault(self.engine, batches, self.routing, seed)
            self._tell_fault(step + 1, f"update {step + 1} dropped: {objection}", where)
        samples = self.progress.samples + self.plan.sequences_per_step
        self.progress = replace(self.progress, step=step + 1, samples=samples)
        learned = self.progress.stage == 1 and bool(sums.counts_LN)
        distilled = learned and self.run.moe.facts.distilled
        assigned = sum(map(sum, sums.counts_LN))
        return sums, {
            "stage": self.progress.stage,
            "loss": loss,
            "balance_loss": sums.balance / max(1, sums.real) if learned and self.run.moe.balance_weight else None,
            "distill_loss": sums.distill / max(1, sums.real) if distilled else None,
            "lr": lr,
            "grad_norm": norm,
            "agreement": sums.agree / max(1, sums.real) if distilled else None,
            "load": sums.loads,
            "drop_rate": sums.dropped / max(1, assigned) if self.run.moe.capacity_factor is not None else None,
            "unserved_rate": sums.unserved / max(1, sums.real * len(sums.counts_LN)) if sums.unserved else None,
        }

    def _speed(self, updates_per_second: float) -> dict[str, float]:
        tokens_per_second = updates_per_second * self.plan.tokens_per_step
        achieved = tokens_per_second * self.flops_per_token
        return {"tokens_per_second": tokens_per_second, "mfu": achieved / (self.peak * self.world.size)}

    def _go_back(self) -> None:
        """Return to the newest checkpoint, but go on behind the data that led here.

        Raises UserError if there is none, or if going back has not helped.
        """
        optimizer, failed, samples = self.run.optimizer, self.progress.step, self.progress.samples
        self.saver.finish()
        found, why = self._newest(), self.guard.reason
        if found is None or not self.guard.go_back(found.checkpoint.progress.step):
            done = (
                "there is no checkpoint to go back to"
                if found is None
                else f"going back to {found.checkpoint.path} has not helped"
            )
            raise UserError(
                f"update {failed}: {why}, {self.run.faults.skip_limit} updates in a row; {done}. Try a lower "
                f"optimizer.lr ({optimizer.lr:g}) or a smaller optimizer.clip ({optimizer.clip:g})"
            )
        if self._planner is not None:
            self._planner.close()
        self.observer.close()
        self._load(found.checkpoint)
        step, before = self.progress.step, self.progress.samples
        self.progress = replace(self.progress, samples=samples)
        self.observer.begin(step)
        self.observer.display.start(self.run.name, step, self.run.schedule.steps)
        what = f"back from update {failed} to step {step} ({why}); samples {before} to {samples} are passed over"
        self._tell_fault(step, what)

    def _tell_fault(self, step: int, what: str, where: str = "") -> None:
        self.observer.log("fault", step, {"what": what, "where": where})
        self.say(f"WARNING: {what}{': ' if where else ''}{where}", "bold red")

    def _switch_if_due(self) -> bool:
        """Fix the routing if it is time: validate both routers, freeze the distilled one, and say if that is bad.

        A router that learns nothing has its table before the first update, and nothing to compare it with.
        """
        if self.progress.stage == 2 or not self.schedule.due(self.progress.step, self.observer.history):
            return False
        step, moe = self.progress.step, self.run.moe
        frozen, before = self.model.frozen_routing(self.token_counts, self.fingerprint), None
        if not moe.facts.fixed:
            self._validate(self.valid, distilled=frozen)
            before = self.observer.routing_state(step, None, record=False)
        self.engine.freeze_distilled()
        self.routing = frozen
        self.progress = replace(self.progress, stage=2, switched_at=step)
        after = self.observer.routing_state(step, self.routing)
        table, least = self._table(), least_load(self.token_counts, moe.experts, moe.top_k)
        agreement = before.agreement if before else 0.0
        # Routers that look further than the id have no table to count with: the probe tells their load.
        load = float(table.expert_load(self.token_counts).max()) if table else after.load if after else 0.0
        sha256 = table.sha256 if table else None
        if moe.facts.fixed:
            text = f"routing is fixed from the start: table {str(sha256)[:12]}, max/mean load {load:.2f}"
            self.say(text, "bold green")
            return True
        switch = {"agreement": agreement, "load": load, "least_load": least, "table_sha256": sha256}
        self.observer.log("switch", step, switch)
        what = f"table {table.sha256[:12]}" if table else f"{moe.distilled.kind} routers"
        self.say(
            f"stage 2 begins with update {step + 1}: routing frozen into {what}; agreement {agreement:.1%}, "
            f"max/mean load {load:.2f} (token frequencies allow {least:.2f})",
            "bold green",
        )
        for warning in switch_warnings(agreement, load, least, self.run.stages):
            self.say(f"WARNING: {warning}", "bold red")
        return True

    def _table(self) -> RoutingTable | None:
        return self.routing.table if isinstance(self.routing, TableRouting) else None

    def _validate(self, data: EvalSet | None, kind: Any = "valid", distilled: FixedRouting | None = None) -> None:
        """In stage 1 with the learned router and, if a switch is to come, with what it would freeze now.

        distilled: that, where it is made already.
        """
        if distilled is None and self.progress.stage == 1 and two_stages(self.run):
            distilled = self.model.frozen_routing(self.token_counts, self.fingerprint)
        self.observer.validate(self.progress.step, data, self.routing, distilled, kind)

    def _resume(self) -> RunConfig | None:
        """Continue from the newest checkpoint if there is one, else begin with an empty history.

        Returns the run as it was when that checkpoint was saved.
        """
        found = self._newest() if self.run.checkpoint.resume else None
        if found is not None:
            self._load(found.checkpoint)
        self.observer.begin(self.progress.step if found is not None else None)
        if found is not None and found.warning:
            self._tell_fault(self.progress.step, found.warning)
        return None if found is None else found.checkpoint.run

    def _newest(self) -> Found | None:
        return find_checkpoint(self.run.directory, self.model, self.groups, self.run.checkpoint)

    def _load(self, checkpoint: Checkpoint) -> None:
        """Become what the checkpoint says."""
        check_tokenizer(checkpoint, self.tokenizer)
        restore(self.engine, checkpoint)
        self.progress, self.saved_step, self.routing = checkpoint.progress, checkpoint.progress.step, None
        self.engine.freeze_distilled(self.progress.stage == 2)
        if self.progress.stage == 2:
            table = checkpoint.table()  # what was frozen, not what would be frozen now
            self.routing = (
                TableRouting(table, self.world.device)
                if table is not None
                else self.model.frozen_routing(self.token_counts, self.fingerprint)
            )

    def _save(self, last: bool) -> None:
        """Begin to save, or save and wait if this process ends here. Raises OSError if the last one fails."""
        if self.guard.dropped and self.progress.step < self.run.schedule.steps:
            return  # if it is the weights that are wrong, they must not become the newest checkpoint
        self.saver.begin(self.progress, self._table())
        if last or not self.run.checkpoint.asynchronous:
            saved = self.saver.finish()
            if last and saved is not None and saved.error is not None:
                raise saved.error

    def _tell_saved(self, saved: Saved) -> None:
        if saved.error is None:
            self.saved_step = saved.step
            self.say(f"step {saved.step}: saved {saved.path}", "dim")
            return
        reason = f"{saved.error.strerror or saved.error}: {saved.error.filename or saved.path}"
        self._tell_fault(self.progress.step, f"step {saved.step} could not be saved: {reason}")

    def _finish(self) -> None:
        """Final figures, and the report if there is a tokenizer to name pieces with."""
        self._validate(self.valid)
        self._validate(self.test, "test")
        if self.world.is_main and self.tokenizer:
            for path in write_report(run_report(Checkpoint.open(self.run.directory)), Path(self.run.directory)):
                self.say(f"wrote {path}")

    def _announce(self, before: RunConfig | None) -> None:
        """Say what is about to be trained. before: the run that is continued, perhaps with other settings."""
        run, plan = self.run, self.plan
        planned = self.schedule.planned
        two = f"stage 2 from update {planned + 1}" if planned is not None else "stage 2 when routing settles"
        stages = two if two_stages(run) else "one stage"
        self.say(
            f"{run.name}: router {run.moe.router}, {self.world.size} x {self.world.device.type}, "
            f"data {plan.data_parallel}, tensor {run.parallel.tensor}, expert {run.parallel.expert}, "
            f"ZeRO {run.parallel.zero_stage}, {run.precision.dtype}",
            "bold",
        )
        self.say(
            f"{plan.tokens_per_step:,} tokens an update = {plan.data_parallel} data ranks x {plan.accumulation} "
            f"micro-batches x {plan.micro_batch} sequences x {run.data.sequence_length} tokens; "
            f"{run.schedule.steps:,} updates, {stages}"
        )
        if before is None:
            return
        self.say(f"continuing after update {self.progress.step}, in stage {self.progress.stage}", "bold")
        pairs = [(key, *show_both(now, was)) for key, now, was in differences(run, before)]
        if changed := [f"{key} {now} (was {was})" for key, now, was in pairs]:
            self.say(f"with other settings than before: {', '.join(changed)}", "bold")


def train(run: RunConfig, world: World, stop: StopRequest | None = None) -> bool:
    """Train a run in this process; see :class:`Trainer`.

    Raises UserError if the ranks do not all have the same run, RunError for what breaks it on the way.
    """
    place, stop = Place(), stop or StopRequest()
    # Launchers end the ranks that a dead one leaves behind by SIGTERM, which must not cut off what these have to say.
    with stop.on(signal.SIGTERM), naming_faults(world, run.directory, place):
        agree_on_run(run, world.rank, world.size)
        return Trainer(run, world, stop, place).fit()
