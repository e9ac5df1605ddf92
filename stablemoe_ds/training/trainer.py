"""A run from start to end: two stages, validation, checkpoints, and a clean stop at any moment."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from stablemoe_ds.config.batch import batch_plan
from stablemoe_ds.config.costs import flops_per_token
from stablemoe_ds.config.rules import check, with_vocabulary
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.metrics import Kind, MetricsLog
from stablemoe_ds.evaluation.perplexity import Evaluation, evaluate, word_perplexity
from stablemoe_ds.evaluation.probe import record_routes
from stablemoe_ds.evaluation.records import RecordFolder
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.fixed import FixedRouting, FrozenRouters, TableRouting, freeze
from stablemoe_ds.routing.table import RoutingTable, least_load
from stablemoe_ds.training.checkpoint import Checkpoint, Progress, newest_checkpoint, restore, save
from stablemoe_ds.training.data import EvalSet, RunData
from stablemoe_ds.training.display import Display
from stablemoe_ds.training.engine import Engine, StepSums
from stablemoe_ds.training.groups import Groups, World
from stablemoe_ds.training.optimizer import learning_rate
from stablemoe_ds.training.session import PROBE_IDS, run_report, write_report
from stablemoe_ds.training.stages import RoutingState, StageSchedule, switch_warnings
from stablemoe_ds.training.throughput import peak_flops
from stablemoe_ds.training.trackers import make_trackers, scalars

PROBES_PER_RUN = 50


class Trainer:
    """One process's part in a run. Build it on every rank, then call :meth:`fit`."""

    def __init__(self, run: RunConfig, world: World) -> None:
        """Raises UserError for a configuration or data that cannot work, before anything is written."""
        check(run, world.size)
        tokenizer = Tokenizer(run.data.tokenizer) if run.data.tokenizer else None
        run = with_vocabulary(run, tokenizer.vocab_size if tokenizer else run.model.vocab_size or 0)
        self.run, self.world = run, world
        self.fingerprint = tokenizer.fingerprint if tokenizer else ""
        self.plan = batch_plan(run, world.size)
        self.groups = Groups(world, run.parallel.tensor, run.parallel.expert)
        self.data = RunData(run, self.plan, self.groups, tokenizer)
        self.valid = self.data.eval_set(run.data.valid, None)
        quick = run.logging.eval_tokens
        self.valid_quick = self.data.eval_set(run.data.valid, quick) if quick else self.valid
        self.test = self.data.eval_set(run.data.test, None)
        model = StableMoEGPT(run, run.model.vocab_size or 0, self.groups.placement)
        self.engine = Engine(run, self.plan, self.groups, model)
        self.model = model
        self.probe = self.data.probe() if model.moe_layers else []
        self.schedule = StageSchedule(run)
        self.progress = Progress()
        self.routing: FixedRouting | None = None
        self._history: list[RoutingState] = []
        self._since_probe: list[StepSums] = []
        self._stop = False
        folder = Path(run.directory)
        self.metrics, self.records = MetricsLog(folder / "metrics.jsonl"), RecordFolder(folder / "probe")
        self.display = Display(world.is_main)
        self.peak, self.peak_source = peak_flops(world.device, run.precision.dtype)

    # ---- the run ----

    def fit(self) -> bool:
        """Train to the end. Returns False if the run was asked to stop and left a checkpoint."""
        run = self.run
        self._resume()
        trackers = make_trackers(run, self.world.is_main)
        self._announce()
        handlers = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        self.display.start(run.name, self.progress.step, run.schedule.steps)
        steps_since, seconds_since = 0, 0.0
        try:
            loader = iter(self.data.train_loader(self.progress.samples))
            while self.progress.step < run.schedule.steps:
                step = self.progress.step
                if self.progress.stage == 1 and self.schedule.due(step, self._history):
                    self._switch()
                began = time.perf_counter()
                sums, norm, lr = self._step(next(loader))
                seconds_since += time.perf_counter() - began
                steps_since += 1
                done = step + 1
                self.progress = replace(
                    self.progress, step=done, samples=self.progress.samples + self.plan.sequences_per_step
                )
                last = done == run.schedule.steps
                stop = sums.stop_requested
                logged = done % run.logging.every == 0 or last or stop
                values = self._figures(sums, norm, lr, steps_since / seconds_since)
                self.display.step(done, run.schedule.steps, values, logged)
                if logged:
                    self._log("train", values)
                    for tracker in trackers:
                        tracker.log(scalars(values, "train"), done)
                    steps_since, seconds_since = 0, 0.0
                if self._due(done, run.logging.probe_every or max(1, run.schedule.steps // PROBES_PER_RUN)) or last:
                    self._record_probe()
                if self._due(done, run.logging.eval_every) and not last:
                    figures = self._validate(self.valid_quick)
                    for tracker in trackers:
                        tracker.log(scalars(figures, "valid"), done)
                if self._due(done, run.checkpoint.every) or last or stop:
                    self._save()
                if stop and not last:
                    self.display.close()
                    self.display.say(f"asked to stop: saved at step {done}; the same command continues the run", "bold")
                    return False
            self.display.close()
            self._finish()
            return True
        finally:
            self.display.close()
            for tracker in trackers:
                tracker.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _step(self, batches: list[Any]) -> tuple[StepSums, float, float]:
        """One update; returns what it saw, the gradient norm and the learning rate."""
        step = self.progress.step
        lr = learning_rate(step, self.run.optimizer, self.run.schedule)
        self.engine.set_learning_rate(lr)
        draw = self.run.seed * 1_000_003 + step
        sums = self.engine.accumulate(batches, self.routing, draw, self._stop)
        if not math.isfinite(sums.loss + sums.balance + sums.distill):
            raise UserError(self._diverged(f"the loss is {sums.loss / max(1, sums.scored)}"))
        norm = self.engine.update()
        if not math.isfinite(norm) and self.run.precision.dtype != "fp16":
            raise UserError(self._diverged(f"the gradient norm is {norm}"))
        self._since_probe.append(sums)
        return sums, norm, lr

    def _diverged(self, what: str) -> str:
        newest = newest_checkpoint(self.run.directory)
        return (
            f"update {self.progress.step + 1}: {what}; newest good checkpoint: {newest or 'none'}. "
            f"Try a lower optimizer.lr ({self.run.optimizer.lr:g}) or a smaller optimizer.clip ({self.run.optimizer.clip:g})"
        )

    def _figures(self, sums: StepSums, norm: float, lr: float, steps_per_second: float) -> dict[str, Any]:
        """What is shown and logged of an update."""
        tokens_per_second = steps_per_second * self.plan.tokens_per_step
        learned = self.progress.stage == 1 and bool(sums.counts_LN)
        assigned = sum(map(sum, sums.counts_LN))
        return {
            "stage": self.progress.stage,
            "loss": sums.loss / max(1, sums.scored),
            "balance_loss": sums.balance / max(1, sums.real) if learned else None,
            "distill_loss": sums.distill / max(1, sums.real) if learned else None,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * flops_per_token(self.run) / (self.peak * self.world.size),
            "agreement": sums.agree / max(1, sums.real) if learned else None,
            "load": sums.loads,
            "drop_rate": sums.dropped / max(1, assigned) if self.run.moe.capacity_factor is not None else None,
        }

    # ---- stages ----

    def _switch(self) -> None:
        """Validate both routers, freeze the distilled one, and say if what is frozen is bad."""
        step = self.progress.step
        self._validate(self.valid)
        self.engine.freeze_distilled()
        self.routing = self._freeze()
        table = self._table()
        agreement = self._mean_agreement()
        counts = self.data.token_counts()
        least = least_load(counts, self.run.moe.experts, self.run.moe.top_k)
        self.progress = replace(self.progress, stage=2, switched_at=step)
        load = float(table.load(counts).max()) if table else self._load_of_frozen_routers()
        self._log(
            "switch",
            {
                "agreement": agreement,
                "load": load,
                "least_load": least,
                "table_sha256": table.sha256 if table else None,
            },
        )
        frozen = f"table {table.sha256[:12]}" if table else f"{self.run.moe.distilled.kind} routers"
        self.display.say(
            f"stage 2 begins before update {step + 1}: routing frozen into {frozen}; agreement {agreement:.1%}, "
            f"max/mean load {load:.2f} (token frequencies allow {least:.2f})",
            "bold green",
        )
        for warning in switch_warnings(agreement, load, least, self.run.stages):
            self.display.say(f"WARNING: {warning}", "bold red")
        self._record_probe()

    def _freeze(self) -> TableRouting | FrozenRouters:
        return freeze(
            self.model.distilled_routers, self.run.moe.top_k, tuple(self.run.moe.layers), self.fingerprint
        )

    def _table(self) -> RoutingTable | None:
        return self.routing.table if isinstance(self.routing, TableRouting) else None

    def _mean_agreement(self) -> float:
        """Agreement over the updates since the last record of the probe, 0 if there was none."""
        real = sum(sums.real for sums in self._since_probe)
        if real:
            return sum(sums.agree for sums in self._since_probe) / real
        return self._history[-1].agreement if self._history else 0.0

    def _load_of_frozen_routers(self) -> float:
        """Largest max/mean load over the probe, for routers that have no table to count with."""
        outcome = evaluate(self.model, self.probe, self.routing, self.groups.sum_over_data_ranks, self.world.device)
        return max(outcome.load)

    # ---- looking at the run ----

    def _record_probe(self) -> None:
        """Record where the probe tokens go now; in stage 1 also how settled routing is."""
        if not self.probe:
            return
        record_LP = self._gather(record_routes(self.model, self.probe, self.routing, self.world.device))
        churn = float((record_LP != self._last_record).mean()) if self._last_record is not None else None
        self._last_record = record_LP
        step = self.progress.step
        if self.world.is_main:
            self.records.append(step, record_LP)
        settled = None
        if self.progress.stage == 1 and churn is not None and self._since_probe:
            counts_LN = np.sum([np.array(sums.counts_LN) for sums in self._since_probe], axis=0)
            load = float((counts_LN.max(1) / counts_LN.mean(1)).max())
            settled = RoutingState(step, self._mean_agreement(), churn, load)
            self._history.append(settled)
        self._log("probe", {"churn": churn, "settled": asdict(settled) if settled else None})
        self._since_probe.clear()

    def _gather(self, local: NDArray[Any]) -> NDArray[Any]:
        """Arrays of all data ranks, joined along the last dimension."""
        parts: list[Any] = [None] * self.groups.data_size
        dist.all_gather_object(parts, local, group=self.groups.data_group)
        return np.concatenate(parts, axis=-1)

    def _evaluate(self, data: EvalSet, routing: FixedRouting | None) -> Evaluation:
        return evaluate(self.model, data.loader, routing, self.groups.sum_over_data_ranks, self.world.device)

    def _validate(self, data: EvalSet | None, kind: Kind = "valid") -> dict[str, Any]:
        """Perplexity now; in stage 1 with the learned and with the distilled router. Logged and said."""
        if data is None:
            return {}
        outcome = self._evaluate(data, self.routing)
        figures: dict[str, Any] = {
            "stage": self.progress.stage,
            "perplexity": outcome.perplexity,
            "loss": outcome.loss,
            "tokens": outcome.tokens,
            "words": data.words,
            "word_perplexity": word_perplexity(outcome, data.words) if data.words else None,
            "agreement": outcome.agreement,
            "load": outcome.load,
        }
        text = f"{kind} perplexity {outcome.perplexity:.3f}"
        if self.progress.stage == 1 and self.model.moe_layers:
            distilled = self._evaluate(data, self._freeze())
            figures["perplexity_distilled"] = distilled.perplexity
            text += f" (learned router), {distilled.perplexity:.3f} (distilled), agreement {outcome.agreement or 0:.1%}"
        self.display.say(f"step {self.progress.step}: {text} over {outcome.tokens:,} tokens")
        self._log(kind, figures)
        return figures

    def _finish(self) -> None:
        self._validate(self.valid)
        self._validate(self.test, "test")
        if self.world.is_main and self.run.data.tokenizer:
            report = run_report(Checkpoint.open(self.run.directory))
            for path in write_report(report, Path(self.run.directory)):
                self.display.say(f"wrote {path}")

    # ---- beginnings and ends ----

    def _resume(self) -> None:
        """Continue from the newest checkpoint if there is one, else begin with an empty history."""
        self._last_record: Any = None
        newest = newest_checkpoint(self.run.directory) if self.run.checkpoint.resume else None
        if newest is not None:
            checkpoint = Checkpoint.open(newest)
            if checkpoint.tokenizer != self.fingerprint:
                raise UserError(
                    f"checkpoint {newest} was trained with tokenizer {checkpoint.tokenizer[:12] or 'none'}, this run names "
                    f"{self.fingerprint[:12] or 'none'}: restore data.tokenizer, or start anew with checkpoint.resume=false"
                )
            restore(self.engine, checkpoint)
            self.progress = checkpoint.progress
            if self.progress.stage == 2:
                self.engine.freeze_distilled()
                self.routing = self._freeze()
                self._check_table(checkpoint)
        if self.world.is_main:
            Path(self.run.directory).mkdir(parents=True, exist_ok=True)
            kept = self.progress.step if newest is not None else -1
            self.metrics.truncate_after(kept)
            self.records.truncate_after(kept)
        if self.probe:
            probe_ids = self._gather(np.concatenate([batch.ids[batch.real].numpy() for batch in self.probe]))
            if self.world.is_main:
                np.save(Path(self.run.directory) / PROBE_IDS, probe_ids)
        dist.barrier()
        if newest is not None:
            self._recall()

    def _check_table(self, checkpoint: Checkpoint) -> None:
        """The table the weights give must be the one that was saved, to the bit."""
        saved, made = checkpoint.table(), self._table()
        if saved is not None and made is not None:
            if saved.sha256 != made.sha256:
                raise UserError(
                    f"checkpoint {checkpoint.path}: its routing table {saved.sha256[:12]} is not the one its weights "
                    f"give ({made.sha256[:12]}): it is damaged; use an older one"
                )
            self.routing = TableRouting(saved, self.world.device)

    def _recall(self) -> None:
        """What the stage schedule had seen before the checkpoint."""
        records = self.records.load_all()
        if records is not None:
            self._last_record = records.expert_RLP[-1]
        for line in self.metrics.read():
            if line["kind"] == "probe" and line.get("settled"):
                self._history.append(RoutingState(**line["settled"]))

    def _save(self) -> None:
        path = save(self.engine, self.progress, self.fingerprint, self._table())
        if self.world.is_main and (table := self._table()) is not None:
            table.save(Path(self.run.directory) / "routing_table.safetensors")
        self.display.say(f"step {self.progress.step}: saved {path}", "dim")

    def _announce(self) -> None:
        run, plan = self.run, self.plan
        planned = self.schedule.planned
        two = f"switch before update {planned + 1}" if planned is not None else "switch when routing settles"
        stages = "one stage" if run.stages.never or run.moe.router == "dense" else two
        self.display.say(
            f"{run.name}: {self.world.size} x {self.world.device.type}, data {plan.data_parallel}, tensor "
            f"{run.parallel.tensor}, expert {run.parallel.expert}, ZeRO {run.parallel.zero_stage}, {run.precision.dtype}; "
            f"{plan.tokens_per_step:,} tokens an update = {plan.data_parallel} x {plan.micro_batch} x "
            f"{plan.accumulation} x {run.data.sequence_length}; {stages}",
            "bold",
        )
        if self.progress.step:
            self.display.say(f"continuing after update {self.progress.step}, stage {self.progress.stage}", "bold")

    def _log(self, kind: Kind, values: dict[str, Any]) -> None:
        if self.world.is_main:
            self.metrics.append(kind, self.progress.step, **values)

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return bool(every) and step % every == 0

    def _ask_to_stop(self, number: int, _frame: Any) -> None:
        if self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop = True


def train(run: RunConfig, world: World) -> bool:
    """Train a run in this process; see :class:`Trainer`."""
    torch.manual_seed(run.seed)
    return Trainer(run, world).fit()
