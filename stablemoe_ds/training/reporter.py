"""What a run records and shows: its history on disk, experiment trackers, and the lines that a person reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.run_directory.metrics import Kind, MetricsLog
from stablemoe_ds.run_directory.rewind import METRICS, rewind
from stablemoe_ds.tables.table import RoutingTable
from stablemoe_ds.training.display import Display
from stablemoe_ds.training.trackers import Tracker, make_trackers, scalars


class Reporter:
    """Writes on the main rank; on the others all methods do nothing."""

    def __init__(self, run: RunConfig, main: bool) -> None:
        self.main, self.folder = main, Path(run.directory)
        self.metrics = MetricsLog(self.folder / METRICS)
        self.display = Display(main)
        self.say = self.display.say
        self._run, self._trackers = run, list[Tracker]()

    def begin(self, step: int | None, table: RoutingTable | None) -> None:
        """Go on from what the directory held after ``step`` updates, or begin an empty one for None. Collective.

        table: what routing was frozen into by then.
        """
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            rewind(self.folder, step, table)
        dist.barrier()
        self._trackers = make_trackers(self._run, self.main, -1 if step is None else step)

    def log(self, kind: Kind, step: int, values: dict[str, Any], series: str | None = None) -> None:
        """A line in the history, and the numbers in it to the trackers: under the name ``series``, or the kind's."""
        if self.main:
            self.metrics.append(kind, step, **values)
        for tracker in self._trackers:
            tracker.log(scalars(values, series or kind), step)

    def fault(self, step: int, what: str, where: str = "") -> None:
        """Something went wrong that the run survives."""
        self.log("fault", step, {"what": what, "where": where})
        self.say(f"WARNING: {what}{': ' if where else ''}{where}", "bold red")

    def close(self) -> None:
        """Flush what is buffered."""
        self.display.close()
        for tracker in self._trackers:
            tracker.close()
