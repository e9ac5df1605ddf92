"""``stablemoe table export``: a table as other programs keep it."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from stablemoe_ds.commands.named_tables import open_table, write_table
from stablemoe_ds.commands.parsing import Subparsers, add_command, json_argument, tell


def add_to(table: Subparsers) -> None:
    export = add_command(table, "export", "write a table for other programs", _export)
    export.add_argument("table", help="table file, checkpoint or run directory")
    export.add_argument("--output", type=Path, required=True, help="the safetensors file to write")
    export.add_argument(
        "--format", choices=("deepseek-v4",), required=True, help="deepseek-v4: a tid2eid for each layer"
    )
    export.add_argument(
        "--dtype", choices=("int64", "int32"), default="int64", help="type of the values (default int64)"
    )
    json_argument(export)


def _export(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.evaluation.table_report import facts_text, table_facts
    from stablemoe_ds.tables.deepseek_v4 import save_deepseek_v4

    table, _ = open_table(arguments.table)
    write_table(table, arguments.output, partial(save_deepseek_v4, dtype=arguments.dtype))
    facts = table_facts(table)
    tell(facts, f"{facts_text(facts)}\nwrote {arguments.output}", arguments.json)
    return 0
