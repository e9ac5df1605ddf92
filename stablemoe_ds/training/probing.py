"""Where a fixed set of validation tokens goes as training goes on: records on disk, and what a plateau is judged by."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from stablemoe_ds.config.rules import probe_every
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.distributed.figures import Figures
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.probe import record_routes
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.source import RouteSource
from stablemoe_ds.run_directory.probe_records import PROBE_IDS, RecordFolder
from stablemoe_ds.run_directory.rewind import PROBE
from stablemoe_ds.tables.expert_load import relative_load
from stablemoe_ds.training.callback import Callback, RunState, Update
from stablemoe_ds.training.reporter import Reporter
from stablemoe_ds.training.stages import RoutingState


class Probing(Callback):
    """A record every ``logging.probe_every`` updates, and one at the end.

    history: the records of stage 1 so far.
    """

    def __init__(
        self,
        run: RunConfig,
        groups: Groups,
        model: StableMoEGPT,
        batches: Sequence[Batch],
        state: RunState,
        reporter: Reporter,
    ) -> None:
        """``batches``: this rank's share of the tokens; empty without MoE layers, and then nothing is recorded."""
        self._every = probe_every(run)
        self._restless = run.moe.restless_rows
        self._groups, self._model, self._batches = groups, model, batches
        self._state, self._reporter = state, reporter
        self._records = RecordFolder(reporter.folder / PROBE)
        self.history: list[RoutingState] = []
        self._last_LP: NDArray[np.int16] | None = None

    def restore(self, step: int | None) -> None:
        """Take up the records up to ``step``, after which there are none, or begin without any for None. Collective.

        Raises UserError, on all ranks, if they were made with a probe of another size.
        """
        records = None if step is None else self._records.load_all()
        if self._batches:
            ids = self._joined(np.concatenate([batch.ids[batch.real].numpy() for batch in self._batches]))
            if records is not None and records.expert_HLP.shape[-1] != len(ids):
                raise UserError(
                    f"{self._records.folder}: holds records of {records.expert_HLP.shape[-1]} tokens, now they would "
                    f"be of {len(ids)}: set logging.probe_tokens to the old value, or move that folder away"
                )
            if self._reporter.main:
                np.save(self._reporter.folder / PROBE_IDS, ids)
        if step is not None:
            self._last_LP = None if records is None else records.expert_HLP[-1]
            settled = [line["settled"] for line in self._reporter.metrics.read() if line.get("settled")]
            self.history = [RoutingState(**state) for state in settled]

    def after_update(self, update: Update) -> None:
        if update.step % self._every == 0 or update.last:
            self.record(self._state.routes)

    def record(self, routes: RouteSource) -> RoutingState | None:
        """As :meth:`look`, and keep it: on disk, and in stage 1 for the judgement of a plateau."""
        began, before_LP = time.perf_counter(), self._last_LP
        measured = self._measure(routes)
        if measured is None:
            return None
        state, self._last_LP, load_LN = measured
        learned = self._state.progress.stage == 1 and before_LP is not None
        if learned:
            self.history.append(state)
        if self._reporter.main:
            self._records.append(state.step, self._last_LP)
        line = {
            "churn": None if before_LP is None else state.churn,
            "load": load_LN.max(1).tolist(),
            "load_cv": load_LN.std(1).tolist(),
            "settled": asdict(state) if learned else None,
            "seconds": time.perf_counter() - began,
        }
        self._reporter.log("probe", state.step, line)
        return state

    def look(self, routes: RouteSource) -> RoutingState | None:
        """Where the tokens go now, compared with the record before, and keep nothing; None if there is no probe."""
        measured = self._measure(routes)
        return None if measured is None else measured[0]

    def _measure(self, routes: RouteSource) -> tuple[RoutingState, NDArray[np.int16], NDArray[np.float64]] | None:
        """The state, and of all ranks' tokens int16 [L, P], their first experts, and float64 [L, N], the load."""
        if not self._batches:
            return None
        device = self._groups.world.device
        local = record_routes(self._model, self._batches, routes, device)
        expert_LP = self._joined(local.expert_LP)
        figures = Figures()
        figures.add(agreed=torch.tensor(local.agreed), compared=torch.tensor(local.compared))
        figures.add(served_LN=torch.from_numpy(local.served_LN))
        totals = figures.totals(lambda packed: self._groups.sum_over_data_ranks(packed.to(device)))
        agreed, compared = totals.count("agreed"), totals.count("compared")
        load_LN = relative_load(totals.rows("served_LN"))
        state = RoutingState(
            step=self._state.progress.step,
            agreement=agreed / compared if compared else 1.0,
            churn=float((expert_LP != self._last_LP)[self._restless].mean()) if self._last_LP is not None else 1.0,
            load=float(load_LN.max()),
        )
        return state, expert_LP, load_LN

    def _joined(self, local: NDArray[Any]) -> NDArray[Any]:
        """What all data ranks have of the probe, [..., P], in the order of its windows, whichever ranks had them."""
        ends = np.cumsum(torch.cat([batch.real.sum(1) for batch in self._batches]).numpy())
        ranks: list[Any] = [None] * self._groups.data_size
        dist.all_gather_object(ranks, np.split(local, ends[:-1], axis=-1), group=self._groups.data_group)
        # Turn by turn, reader by reader, sequence by sequence, and of that part by part.
        parts, sequences = self._groups.sequence, len(self._batches[0].ids)
        ordered = [
            ranks[first + part][turn + sequence]
            for turn in range(0, len(ends), sequences)
            for first in range(0, len(ranks), parts)
            for sequence in range(sequences)
            for part in range(parts)
        ]
        return np.concatenate(ordered, axis=-1)
