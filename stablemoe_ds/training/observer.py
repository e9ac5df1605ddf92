"""What is measured of a run while it goes on: validation, the routing of the probe set, the history of both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.run_data import EvalSet
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.perplexity import evaluate, word_perplexity
from stablemoe_ds.evaluation.probe import record_routes
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.fixed import FixedRouting
from stablemoe_ds.run_directory.metrics import Kind, MetricsLog
from stablemoe_ds.run_directory.probe_records import PROBE_IDS, RecordFolder
from stablemoe_ds.training.display import Display
from stablemoe_ds.training.stages import RoutingState
from stablemoe_ds.training.trackers import make_trackers, scalars


class Observer:
    """Measures on every rank, writes on the main one."""

    def __init__(self, run: RunConfig, groups: Groups, model: StableMoEGPT, probe: Sequence[Batch]) -> None:
        """``probe``: this rank's share of the fixed tokens whose routing is recorded; empty without MoE layers."""
        self.run, self.groups, self.model, self.probe = run, groups, model, probe
        self.main = groups.world.is_main
        self.folder = Path(run.directory)
        self.metrics, self.records = MetricsLog(self.folder / "metrics.jsonl"), RecordFolder(self.folder / "probe")
        self.display = Display(self.main)
        self.history: list[RoutingState] = []
        self._last_LP: NDArray[np.int16] | None = None

    def begin(self, step: int | None) -> None:
        """Go on from the history up to ``step``, or begin an empty one for None.

        Raises UserError, on all ranks, if that was recorded with a probe of another size.
        """
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.metrics.truncate_after(-1 if step is None else step)
            self.records.truncate_after(-1 if step is None else step)
        dist.barrier()
        records = None if step is None else self.records.load_all()
        if self.probe:
            ids = self._joined(np.concatenate([batch.ids[batch.real].numpy() for batch in self.probe]))
            if records is not None and records.expert_RLP.shape[-1] != len(ids):
                raise UserError(
                    f"{self.records.folder}: holds records of {records.expert_RLP.shape[-1]} tokens, now they would be "
                    f"of {len(ids)}: set logging.probe_tokens as it was, or move that folder away"
                )
            if self.main:
                np.save(self.folder / PROBE_IDS, ids)
        if step is not None:
            self._last_LP = None if records is None else records.expert_RLP[-1]
            settled = [line["settled"] for line in self.metrics.read() if line.get("settled")]
            self.history = [RoutingState(**state) for state in settled]
        self._trackers = make_trackers(self.run, self.main)

    def close(self) -> None:
        """Flush what is buffered."""
        self.display.close()
        for tracker in self._trackers:
            tracker.close()

    def log(self, kind: Kind, step: int, values: dict[str, Any]) -> None:
        """A line in the history, and the numbers in it to the trackers."""
        if self.main:
            self.metrics.append(kind, step, **values)
        for tracker in self._trackers:
            tracker.log(scalars(values, kind), step)

    def routing_state(self, step: int, routing: FixedRouting | None, record: bool = True) -> RoutingState | None:
        """Where the probe tokens go now, compared with the record before; None if there is no probe.

        ``record``: keep it. In stage 1 what is kept is what a plateau is judged by.
        """
        if not self.probe:
            return None
        began = time.perf_counter()
        local = record_routes(self.model, self.probe, routing, self.groups.world.device)
        expert_LP = self._joined(local.expert_LP)
        sums = torch.tensor([local.agreed, local.compared, *local.served_LN.reshape(-1).tolist()])
        agreed, compared, *served = self.groups.sum_over_data_ranks(sums.to(self.groups.world.device)).tolist()
        served_LN = np.array(served).reshape(local.served_LN.shape)
        state = RoutingState(
            step=step,
            agreement=agreed / compared if compared else 1.0,
            churn=float((expert_LP != self._last_LP).mean()) if self._last_LP is not None else 1.0,
            load=float((served_LN.max(1) / served_LN.mean(1)).max()),
        )
        if record:
            first, self._last_LP = self._last_LP is None, expert_LP
            learned = routing is None and not first
            if learned:
                self.history.append(state)
            if self.main:
                self.records.append(step, expert_LP)
            line = {
                "churn": None if first else state.churn,
                "settled": asdict(state) if learned else None,
                "seconds": time.perf_counter() - began,
            }
            self.log("probe", step, line)
        return state

    def validate(
        self,
        step: int,
        data: EvalSet | None,
        routing: FixedRouting | None,
        distilled: FixedRouting | None,
        kind: Kind = "valid",
    ) -> None:
        """Perplexity along ``routing`` (None: the learned routers) and, in stage 1, along the distilled one."""
        if data is None:
            return
        reduce, device = self.groups.sum_over_data_ranks, self.groups.world.device
        outcome = evaluate(self.model, data.loader, routing, reduce, device)
        values: dict[str, Any] = {
            "stage": 1 if routing is None else 2,
            "perplexity": outcome.perplexity,
            "loss": outcome.loss,
            "tokens": outcome.tokens,
            "words": data.words,
            "word_perplexity": word_perplexity(outcome, data.words) if data.words else None,
            "agreement": outcome.agreement,
            "load": outcome.load,
        }
        text = f"{kind} perplexity {outcome.perplexity:.3f}"
        if distilled is not None:
            beside = evaluate(self.model, data.loader, distilled, reduce, device).perplexity
            values["perplexity_distilled"] = beside
            text += f" (learned router), {beside:.3f} (distilled), agreement {outcome.agreement or 0:.1%}"
        self.display.say(f"step {step}: {text} over {outcome.tokens:,} tokens")
        self.log(kind, step, values)

    def _joined(self, local: NDArray[Any]) -> NDArray[Any]:
        """What all data ranks have of the probe, [..., P], in the order of its windows, whoever they were dealt to."""
        ends = np.cumsum([int(batch.real.sum()) for batch in self.probe])
        ranks: list[Any] = [None] * self.groups.data_size
        dist.all_gather_object(ranks, np.split(local, ends[:-1], axis=-1), group=self.groups.data_group)
        return np.concatenate([part for turn in zip(*ranks, strict=True) for part in turn], axis=-1)
