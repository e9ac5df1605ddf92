"""A run from start to end: the loop over updates, and what has to be built for it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from stablemoe_ds.checkpoint.attached import check_tokenizer, to_attach
from stablemoe_ds.checkpoint.reader import Checkpoint, Progress
from stablemoe_ds.checkpoint.restore import Found, find_checkpoint, restore
from stablemoe_ds.config.cautions import cautions
from stablemoe_ds.config.difference import differences
from stablemoe_ds.config.idle_settings import idle_text
from stablemoe_ds.config.messages import show_both
from stablemoe_ds.config.resolved import resolve
from stablemoe_ds.config.rules import two_stages
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.corpus import token_counts
from stablemoe_ds.data.run_data import RunData
from stablemoe_ds.data.table_corpus import text_digest
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.distributed.faults import Place, naming_faults
from stablemoe_ds.distributed.groups import Groups, World
from stablemoe_ds.distributed.rendezvous import agree_on_run
from stablemoe_ds.distributed.signals import StopRequest
from stablemoe_ds.distributed.together import StopVote, of_first_rank, on_first_rank_within
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.run_report import run_report, write_report
from stablemoe_ds.model.table_start import start_from_table
from stablemoe_ds.routing.source import RouteMaker
from stablemoe_ds.run_directory.lock import only_writer
from stablemoe_ds.run_directory.progress import newest_saved, reported_steps
from stablemoe_ds.training.built_table import built_table
from stablemoe_ds.training.callback import Callback, RunState, Update
from stablemoe_ds.training.engine import Engine
from stablemoe_ds.training.feed import Feed
from stablemoe_ds.training.guard import GRADIENT, Guard, find_fault
from stablemoe_ds.training.optimizer import learning_rate
from stablemoe_ds.training.probing import Probing
from stablemoe_ds.training.reporter import Reporter
from stablemoe_ds.training.routed_batch import RoutedBatch
from stablemoe_ds.training.run_places import expert_places
from stablemoe_ds.training.saving import Saving
from stablemoe_ds.training.sharded_weights import build_model, gathered
from stablemoe_ds.training.stage_switch import StageSwitch
from stablemoe_ds.training.update_figures import UpdateFigures
from stablemoe_ds.training.update_log import UpdateLog
from stablemoe_ds.training.validation import Validation


class Trainer:
    """One process's part in a run. Build it on every rank, then call :meth:`fit`."""

    def __init__(
        self, run: RunConfig, world: World, stop: StopRequest | None = None, place: Place | None = None
    ) -> None:
        """Raises UserError for a configuration or data that cannot work, before anything is written.

        stop: a request that may have come already. place: kept up to date with where the run is.
        """
        self.tokenizer = Tokenizer(run.data.tokenizer) if run.data.tokenizer else None
        known = (self.tokenizer.vocab_size, self.tokenizer.eos_id) if self.tokenizer else None
        before = of_first_rank(lambda: newest_saved(run.directory)) if run.checkpoint.resume else None
        resolved = resolve(run, world.size, known, before.run if before else None)
        self.run, self.world, self.plan = resolved.run, world, resolved.batch
        run, fingerprint = self.run, self.tokenizer.fingerprint if self.tokenizer else ""
        self.groups = Groups(world, run.parallel.tensor, run.parallel.expert, run.parallel.sequence)
        self.data = RunData(run, self.plan, self.groups, self.tokenizer)
        counts = self.token_counts = token_counts(run.data.train, self.tokenizer, resolved.vocab_size)
        self.reporter = Reporter(run, world.is_main)
        # Once: the places of the experts may need the table before the run follows it.
        build = cache(partial(built_table, run, resolved.vocab_size, self.tokenizer, self.reporter.say))
        places = expert_places(run, counts, fingerprint, build)
        placement = replace(self.groups.placement, places=places)
        self.model = build_model(run, resolved.vocab_size, placement)
        routers = self.model.distilled_routers
        whole = partial(gathered, routers)
        text = text_digest(run.data.train, self.tokenizer)
        self.routes = RouteMaker(run, routers, lambda: counts, fingerprint, world.device, build, whole, text)
        if run.moe.start_table is not None and before is None:
            table = self.routes.named()
            start_from_table(self.model, table, counts)
            self.reporter.say(f"routers start from table {table.sha256[:12]}")
        self.engine = Engine(run, self.plan, self.groups, self.model)
        self.feed = Feed(self.groups, run.parallel, places)
        self.state, self.guard, self.vote = (
            RunState(Progress(position=self.data.train.start())),
            Guard(run.faults),
            StopVote(world),
        )
        self.resumption: list[str] = []
        self.stop, self.place = stop or StopRequest(), place or Place()
        state, engine, reporter = self.state, self.engine, self.reporter
        probe = self.data.probe() if self.model.moe_layers else []
        self.probing = Probing(run, self.groups, self.model, probe, state, reporter)
        validation = Validation(run.logging, self.data, self.groups, self.model, self.routes, state, reporter)
        self.switch = StageSwitch(
            run, state, engine, self.feed, self.routes, counts, reporter, probing=self.probing, validation=validation
        )
        attached = to_attach(self.tokenizer, counts)
        self.saving = Saving(run.checkpoint, state, engine, fingerprint, attached, reporter)
        self.log = UpdateLog(resolved, world, state, engine, reporter)
        # A checkpoint comes after the switch, so that a run which continues from it does not switch once more.
        self.callbacks: list[Callback] = [self.log, self.probing, validation, self.switch, self.saving]

    def fit(self) -> bool:
        """Train to the end. Returns False if the run was asked to stop and left a checkpoint."""
        self._announce(self._resume())
        steps, reporter = self.run.schedule.steps, self.reporter
        if self.state.progress.step >= steps and reported_steps(Path(self.run.directory)) >= steps:
            reporter.close()
            reporter.say(f"this run is finished; its report is in {self.run.directory}")
            return True
        with self.stop.on(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), ExitStack() as closing:
            for part in (reporter, self.saving, self.feed):  # from the last to the first
                closing.callback(part.close)
            reporter.display.start(self.run.name, self.state.progress.step, steps)
            if self.state.progress.step < steps and not self._train(steps):
                reporter.display.close()
                where = f"asked to stop: saved at step {self.saving.step}"
                reporter.say(f"{where}; the same command continues the run", "bold")
                return False
            reporter.display.close()
            for callback in self.callbacks:
                callback.finish()
            self._report()
            return True

    def _train(self, steps: int) -> bool:
        """Update until the end of the run; False if it was asked to stop before."""
        self._begin()
        while self.state.progress.step < steps:
            update = self._update()
            if self.guard.exhausted:
                self._go_back()
                self._begin()
                continue
            for callback in self.callbacks:
                callback.after_update(update)
            if update.stop and not update.last:
                return False
        return True

    def _begin(self) -> None:
        self.feed.start(self._loader(), self.state.routes)
        for callback in self.callbacks:
            callback.begin()

    def _loader(self) -> Iterator[list[Batch]]:
        """Batches from here to the end of the run."""
        progress = self.state.progress
        return self.data.train.updates(progress.position, self.run.schedule.steps - progress.step)

    def _update(self) -> Update:
        """The next update, made or dropped. No figure of it is fetched unless something is wrong."""
        began, progress = time.perf_counter(), self.state.progress
        self.place.enter(progress.step + 1)
        batches = self.feed.next()
        lr = learning_rate(progress.step, self.run.optimizer, self.run.schedule)
        self.engine.set_learning_rate(lr)
        seed = self.run.seed * 1_000_003 + progress.step
        self.vote.cast(self.stop.asked)
        figures = self.engine.accumulate(batches, self.state.routes, seed)
        self._keep_or_drop(batches, figures, seed)
        samples = progress.samples + self.plan.sequences_per_step
        position = self.data.train.after(progress.position)
        self.state.progress = replace(progress, step=progress.step + 1, samples=samples, position=position)
        # Not after a dropped update, which is not saved: it is asked again, and answered, when one is kept.
        stop = self.vote.outcome() and not self.guard.dropped
        return Update(
            step=progress.step + 1,
            lr=lr,
            figures=figures,
            dropped=self.guard.dropped > 0,
            last=progress.step + 1 == self.run.schedule.steps,
            stop=stop,
            seconds=time.perf_counter() - began,
        )

    def _keep_or_drop(self, batches: list[RoutedBatch], figures: UpdateFigures, seed: int) -> None:
        """Step the optimizer, or report the reason not to."""
        totals = figures.totals() if self.guard.watches_losses else None
        objection = self.guard.objection(totals) if totals else None
        if not self.engine.update(keep=objection is None) and objection is None:
            totals = figures.totals()
            objection = self.guard.objection(totals)
            # At fp16 an overflow is expected now and then: DeepSpeed skips the update and lowers the loss scale.
            if objection is None and self.run.precision.dtype != "fp16":
                objection = GRADIENT
        if objection is None:
            self.guard.keep(totals.mean_loss if totals else None)
            self.engine.teach_routers(figures)
            return
        self.guard.drop(objection)
        spike = totals is not None and totals.finite and objection != GRADIENT
        where = "" if spike else find_fault(self.engine, batches, self.state.routes, seed)
        step = self.state.progress.step + 1
        self.reporter.fault(step, f"update {step} dropped: {objection}", where)

    def _go_back(self) -> None:
        """Return to the newest checkpoint, but go on behind the data that led here.

        Raises UserError if there is none, or if going back has not helped.
        """
        optimizer, failed, why = self.run.optimizer, self.state.progress, self.guard.reason
        self.saving.wait()
        found = self._newest()
        if found is None or not self.guard.go_back(found.checkpoint.progress.step):
            done = (
                "there is no checkpoint to go back to"
                if found is None
                else f"going back to {found.checkpoint.path} has not helped"
            )
            raise UserError(
                f"update {failed.step}: {why}, {self.run.faults.skip_limit} updates in a row; {done}. Try a lower "
                f"optimizer.lr ({optimizer.lr:g}) or a smaller optimizer.clip ({optimizer.clip:g})"
            )
        self.feed.close()
        self.reporter.close()
        self._load(found.checkpoint)
        step, skipped = self.state.progress.step, failed.position.tokens - self.state.progress.position.tokens
        self.state.progress = replace(self.state.progress, samples=failed.samples, position=failed.position)
        self._restore_history(step)
        self.reporter.display.start(self.run.name, step, self.run.schedule.steps)
        passed = f"{skipped:,} tokens are not read in this epoch"
        self.reporter.fault(step, f"back from update {failed.step} to step {step} ({why}); {passed}")

    def _resume(self) -> RunConfig | None:
        """Continue from the newest checkpoint if there is one, else begin with an empty history.

        Returns the run as it was when that checkpoint was saved.
        """
        found = self._newest() if self.run.checkpoint.resume else None
        if found is not None:
            self._load(found.checkpoint)
        else:
            self.routes.check()
            self.state.routes = self.routes.learning()
        self._restore_history(self.state.progress.step if found is not None else None)
        if found is not None and found.warning:
            self.reporter.fault(self.state.progress.step, found.warning)
        return None if found is None else found.checkpoint.run

    def _newest(self) -> Found | None:
        return find_checkpoint(self.run.directory, self.model, self.groups, self.run.checkpoint)

    def _load(self, checkpoint: Checkpoint) -> None:
        """Load weights, routes and progress of a checkpoint."""
        check_tokenizer(checkpoint, self.tokenizer)
        restore(self.engine, checkpoint)
        progress = checkpoint.progress
        position, self.resumption = self.data.train.resume(progress.position, progress.samples, checkpoint.run)
        self.engine.freeze_distilled(progress.stage == 2)
        self.state.progress, self.saving.step = replace(progress, position=position), progress.step
        table = checkpoint.table()
        self.state.routes = self.routes.restored(progress.stage, table)
        self.resumption += self.routes.departures(table)

    def _restore_history(self, step: int | None) -> None:
        """What was recorded up to ``step``; None: nothing."""
        self.reporter.begin(step, self.state.routes.table)
        self.probing.restore(step)

    def _report(self) -> None:
        """The report of the run, if there is a tokenizer to name pieces with."""
        if self.world.is_main and self.tokenizer:
            for path in write_report(run_report(Checkpoint.open(self.run.directory)), Path(self.run.directory)):
                self.reporter.say(f"wrote {path}")

    def _announce(self, before: RunConfig | None) -> None:
        """Print what is about to be trained. before: the run that is continued, perhaps with other settings."""
        run, plan = self.run, self.plan
        planned = self.switch.schedule.planned
        placed = ""
        if run.parallel.places_by_load:
            known = all(layer.place_N is not None for layer in self.model.moe_layers)
            placed = " placed by load" if known else " by number, as no table is known before the switch"
            if known and run.parallel.replicated_experts:
                placed += f" (the {run.parallel.replicated_experts} heaviest of a layer on every rank)"
        shared = f"sequence {plan.sequence}, " if plan.sequence > 1 else ""
        two = f"stage 2 from update {planned + 1}" if planned is not None else "stage 2 when routing settles"
        stages = two if two_stages(run) else "one stage"
        self.reporter.say(
            f"{run.name}: router {run.moe.router}, {self.world.size} x {self.world.device.type}, "
            f"data {plan.data_parallel}, tensor {run.parallel.tensor}, expert {run.parallel.expert}{placed}, "
            f"{shared}ZeRO {run.parallel.zero_stage}, {run.precision.dtype}",
            "bold",
        )
        self.reporter.say(
            f"{plan.tokens_per_step:,} tokens an update = {plan.data_parallel} data ranks x {plan.accumulation} "
            f"micro-batches x {plan.micro_batch} sequences x {run.data.sequence_length} tokens; "
            f"{run.schedule.steps:,} updates, {stages}"
        )
        table = self.state.routes.table
        if run.moe.table_layers and table is not None and self.state.progress.stage == 1:
            at, load = ", ".join(map(str, run.moe.table_layers)), table.expert_load(self.token_counts).max()
            said = f"table {table.sha256[:12]} from the start, max/mean load {load:.2f}"
            self.reporter.say(f"MoE layers at blocks {at} follow {said}; router {run.moe.router} learns in the others")
        each = "GPU" if self.world.device.type == "cuda" else "process"
        peak, sheet = self.log.peak
        self.reporter.say(f"MFU is relative to {peak / 1e12:,.4g} TFLOP/s a {each}: {sheet}")
        if (idle := idle_text(run.moe)) is not None:
            self.reporter.say(idle)
        for caution in cautions(run, self.world.size):
            self.reporter.say(f"WARNING: {caution}", "bold red")
        if before is None:
            return
        self.reporter.say(
            f"continuing after update {self.state.progress.step}, in stage {self.state.progress.stage}", "bold"
        )
        pairs = [(key, *show_both(now, was)) for key, now, was in differences(run, before)]
        if changed := [f"{key} {now} (was {was})" for key, now, was in pairs]:
            self.reporter.say(f"with different settings than before: {', '.join(changed)}", "bold")
        for line in self.resumption:
            self.reporter.say(line, "bold red" if line.startswith("WARNING") else "bold")


def train(run: RunConfig, world: World, stop: StopRequest | None = None) -> bool:
    """Train a run in this process; see :class:`Trainer`.

    Raises UserError if the ranks do not all have the same run or another process writes into its directory, RunError
    for what breaks it on the way.
    """
    place, stop = Place(), stop or StopRequest()
    # Launchers end the ranks that a dead one leaves behind by SIGTERM, which must not cut off what these have to say.
    with stop.on(signal.SIGTERM), naming_faults(world, run.directory, place):
        agree_on_run(run, world.rank, world.size)
        with on_first_rank_within(only_writer(run.directory)):
            return Trainer(run, world, stop, place).fit()
