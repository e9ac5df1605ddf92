"""``stablemoe routing``: what was learned about routing."""

from __future__ import annotations

import argparse
from pathlib import Path

from stablemoe_ds.commands.named_tables import open_table, write_table
from stablemoe_ds.commands.parsing import (
    Subparsers,
    add_command,
    add_group,
    json_argument,
    settle_libraries,
    tell,
    tokenizer_argument,
)


def add_to(commands: Subparsers) -> None:
    routing = add_group(commands, "routing", "what was learned about routing", "report|bands|table")
    report = add_command(routing, "report", "load, fluctuation, agreement, what each expert serves", _routing_report)
    report.add_argument("checkpoint", help="checkpoint or run directory")
    tokenizer_argument(report)
    json_argument(report)
    report.add_argument("--png", type=Path, help="draw the report, too")
    bands = add_command(
        routing, "bands", "loss and gates by how common an id is, of one model or of two in comparison", _routing_bands
    )
    bands.add_argument("checkpoint", help="checkpoint or run directory")
    bands.add_argument("--against", metavar="CHECKPOINT", help="a second model of the same tokenizer")
    bands.add_argument("--data", nargs="+", default=[], metavar="CORPUS", help="default: the run's validation text")
    bands.add_argument("--bands", type=int, default=5, help="how many (default 5)")
    json_argument(bands)
    table = add_command(
        routing, "table", "the frozen routing table itself, as 'stablemoe table show' without measuring", _routing_table
    )
    table.add_argument("checkpoint", help="checkpoint or run directory, or a table file")
    table.add_argument("--output", type=Path, help="write the table as a safetensors file of its own")
    json_argument(table)


def _routing_report(arguments: argparse.Namespace) -> int:
    settle_libraries(arguments.checkpoint)
    from stablemoe_ds.checkpoint.reader import Checkpoint
    from stablemoe_ds.evaluation.plots import draw
    from stablemoe_ds.evaluation.report_text import render_text
    from stablemoe_ds.evaluation.run_report import run_report

    report = run_report(Checkpoint.open(arguments.checkpoint), arguments.tokenizer)
    tell(report, render_text(report), arguments.json)
    if arguments.png:
        draw(report, arguments.png)
    return 0


def _routing_bands(arguments: argparse.Namespace) -> int:
    paths = [path for path in (arguments.checkpoint, arguments.against) if path]
    settle_libraries(*paths)
    from stablemoe_ds.evaluation.frequency_bands import bands_of_checkpoints

    facts, text = bands_of_checkpoints(paths, arguments.data, arguments.bands)
    tell({"checkpoints": facts}, text, arguments.json)
    return 0


def _routing_table(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.evaluation.table_report import facts_text, table_facts

    table, _ = open_table(arguments.checkpoint)
    if arguments.output:
        write_table(table, arguments.output)
    facts = table_facts(table)
    tell(facts, facts_text(facts), arguments.json)
    return 0
