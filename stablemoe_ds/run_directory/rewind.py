"""Rewinding a run directory: removes what was written after the step from which a run continues."""

from __future__ import annotations

from pathlib import Path

from stablemoe_ds.run_directory.metrics import MetricsLog
from stablemoe_ds.run_directory.probe_records import RecordFolder
from stablemoe_ds.run_directory.progress import reported_steps
from stablemoe_ds.tables.table import RoutingTable

METRICS, PROBE, TABLE, REPORTS = "metrics.jsonl", "probe", "routing_table.safetensors", ("report.json", "report.png")
WANDB_ID = "wandb_id"
"""File with the id of the run at Weights & Biases."""


def rewind(run_dir: Path, step: int | None, table: RoutingTable | None) -> None:
    """Leave a run directory as it was after ``step`` updates, None: before the first.

    table: what routing was frozen into by then, None in stage 1. Checkpoints stay, to be replaced as the run goes on,
    and so do TensorBoard's events, which are marked as void by what is written next.
    """
    MetricsLog(run_dir / METRICS).truncate_after(-1 if step is None else step)
    RecordFolder(run_dir / PROBE).truncate_after(-1 if step is None else step)
    stale = [*REPORTS] if step is None or reported_steps(run_dir) > step else []
    if step is None:
        stale.append(WANDB_ID)  # it is another run that begins in this directory
    if table is None:
        stale.append(TABLE)
    for name in stale:
        (run_dir / name).unlink(missing_ok=True)
    if table is not None:
        part = run_dir / f".{TABLE}.part"
        table.save(part)
        part.replace(run_dir / TABLE)
