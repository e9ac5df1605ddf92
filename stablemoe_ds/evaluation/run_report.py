"""The routing report of a run, from what its directory holds; no model is built for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.data.corpus import token_counts
from stablemoe_ds.evaluation.plots import draw
from stablemoe_ds.evaluation.report import routing_report
from stablemoe_ds.evaluation.specialisation import IdUse, use_of_pairs, use_of_table
from stablemoe_ds.evaluation.trained_model import check_tokenizer, open_tokenizer
from stablemoe_ds.run_directory.metrics import MetricsLog
from stablemoe_ds.run_directory.probe_records import PROBE_IDS, RecordFolder


def run_report(checkpoint: Checkpoint) -> dict[str, Any]:
    """The routing report of the run a checkpoint belongs to."""
    run, folder = checkpoint.run, checkpoint.path.parent.parent
    tokenizer = open_tokenizer(checkpoint)
    check_tokenizer(checkpoint, tokenizer)
    records = RecordFolder(folder / "probe").load_all()
    table = checkpoint.table()
    uses: list[IdUse] = []
    if table is not None:
        counts = token_counts(run.data.train, tokenizer, table.vocab_size)
        uses = [use_of_table(table, layer, counts) for layer in range(len(table.blocks))]
    elif records is not None and (folder / PROBE_IDS).exists():
        ids = np.load(folder / PROBE_IDS)
        final_LP = records.expert_RLP[-1]
        uses = [
            use_of_pairs(ids, experts, run.moe.experts, block)
            for block, experts in zip(run.moe.layers, final_LP, strict=True)
        ]
    return routing_report(
        name=run.name,
        steps=run.schedule.steps,
        tokens_per_step=run.schedule.tokens_per_step,
        metrics=MetricsLog(folder / "metrics.jsonl").read(),
        records=records,
        uses=uses,
        piece=tokenizer.piece,
    )


def write_report(report: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.png``; returns their paths."""
    text, picture = folder / "report.json", folder / "report.png"
    text.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, picture)
    return text, picture
