"""``stablemoe table export`` and ``import``: tables as other programs keep them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from stablemoe_ds.commands.named_tables import open_table, write_table
from stablemoe_ds.commands.parsing import Subparsers, add_command, json_argument, tell
from stablemoe_ds.errors import UserError

if TYPE_CHECKING:
    from stablemoe_ds.tables.table import RoutingTable

FORMATS = ("deepseek-v4", "megatron", "npz")


def add_to(table: Subparsers) -> None:
    export = add_command(table, "export", "write a table for other programs", _export)
    export.add_argument("table", help="table file, checkpoint or run directory")
    export.add_argument("--output", type=Path, required=True, help="the file to write")
    export.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="deepseek-v4: a tid2eid for each layer, as the release, transformers and NeMo Automodel read it; "
        "megatron: the same by Megatron-LM's names; npz: numpy's arrays",
    )
    export.add_argument("--dtype", choices=("int64", "int32"), help="of a tid2eid's values (default int64)")
    json_argument(export)

    given = add_command(table, "import", "read a table of another program", _import)
    given.add_argument("file", type=Path, help="safetensors with tid2eid, or npz")
    given.add_argument("--output", type=Path, required=True, help="the safetensors file to write")
    given.add_argument("--experts", type=int, help="N, if the file does not say; default: the largest named, plus one")
    given.add_argument("--layers", type=int, nargs="+", metavar="BLOCK", help="blocks of its layers")
    given.add_argument("--tokenizer", type=Path, help="whose ids these are; runs with another one refuse the table")
    json_argument(given)


def _export(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.tables.table_file import writer

    if arguments.format == "npz" and arguments.dtype is not None:
        raise UserError("--dtype is of a tid2eid's values; a table in npz is int32: leave --dtype out")
    table, _ = open_table(arguments.table)
    write_table(table, arguments.output, writer(arguments.format, arguments.dtype or "int64"))
    return _finish(table, arguments)


def _import(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.tables.table_file import read_table

    table = read_table(arguments.file, arguments.experts)
    if arguments.experts is not None and table.experts != arguments.experts:
        raise UserError(f"--experts: got {arguments.experts}, but {arguments.file} says {table.experts}: leave it out")
    if arguments.layers is not None:
        if len(arguments.layers) != len(table.blocks) or sorted(set(arguments.layers)) != arguments.layers:
            raise UserError(
                f"--layers: got {arguments.layers}: expected {len(table.blocks)} blocks, ascending, as "
                f"{arguments.file} has layers"
            )
        table = replace(table, blocks=tuple(arguments.layers))
    if arguments.tokenizer is not None:
        from stablemoe_ds.data.tokenizer import Tokenizer

        tokenizer = Tokenizer(arguments.tokenizer)
        if tokenizer.vocab_size > table.vocab_size:
            raise UserError(
                f"--tokenizer: {arguments.tokenizer} has {tokenizer.vocab_size} ids, but {arguments.file} has "
                f"{table.vocab_size}: it is of another tokenizer"
            )
        table = replace(table, tokenizer=tokenizer.fingerprint)
    write_table(table, arguments.output)
    return _finish(table, arguments)


def _finish(table: RoutingTable, arguments: argparse.Namespace) -> int:
    from stablemoe_ds.evaluation.table_report import facts_text, table_facts

    facts = table_facts(table)
    tell(facts, f"{facts_text(facts)}\nwrote {arguments.output}", arguments.json)
    return 0
