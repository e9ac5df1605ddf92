"""The routing report of a run, from what its checkpoint and its directory hold; no model is built for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from stablemoe_ds.checkpoint.attached import open_tokenizer, token_counts_of
from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.evaluation.plots import draw
from stablemoe_ds.evaluation.report import routing_report
from stablemoe_ds.evaluation.specialisation import IdUse, use_of_pairs, use_of_table
from stablemoe_ds.run_directory.metrics import MetricsLog
from stablemoe_ds.run_directory.probe_records import PROBE_IDS, RecordFolder
from stablemoe_ds.run_directory.rewind import METRICS, PROBE, REPORTS


def run_report(checkpoint: Checkpoint, tokenizer_file: str | None = None) -> dict[str, Any]:
    """The routing report of the run a checkpoint belongs to.

    A checkpoint that was copied out of its run directory has no history; what is left is its table.
    tokenizer_file: instead of the one that the checkpoint carries.
    """
    run, folder = checkpoint.run, checkpoint.run_directory
    tokenizer = open_tokenizer(checkpoint, tokenizer_file)
    records = RecordFolder(folder / PROBE).load_all() if folder else None
    metrics = MetricsLog(folder / METRICS).read() if folder else []
    table, switched_at = checkpoint.table(), checkpoint.progress.switched_at
    if not metrics and table is not None and switched_at:
        metrics = [{"kind": "switch", "step": switched_at, "table_sha256": table.sha256}]  # the checkpoint knows this
    uses: dict[int, IdUse] = {}
    if folder is not None and records is not None and (folder / PROBE_IDS).exists():
        ids = np.load(folder / PROBE_IDS)
        for block, experts_P in zip(run.moe.layers, records.expert_HLP[-1], strict=True):
            uses[block] = use_of_pairs(ids, experts_P, run.moe.experts, block)
    if table is not None:  # it knows more: where every id of the training text goes
        counts = token_counts_of(checkpoint)
        uses |= {block: use_of_table(table, layer, counts) for layer, block in enumerate(table.blocks)}
    return routing_report(
        name=run.name,
        steps=run.schedule.steps,
        tokens_per_step=run.schedule.tokens_per_step,
        metrics=metrics,
        records=records.of_layers(run.moe.restless_rows) if records else None,
        uses=[uses[block] for block in sorted(uses)],
        piece=tokenizer.piece,
        top_k=run.moe.top_k,
    )


def write_report(report: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.png``; returns their paths."""
    text, picture = (folder / name for name in REPORTS)
    text.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, picture)
    return text, picture
