"""``stablemoe table``: inspect and compare routing tables; the other things to do with them have their own files."""

from __future__ import annotations

import argparse
from pathlib import Path

from stablemoe_ds.commands import table_bounds, table_build, table_distil, table_exchange, table_simulate
from stablemoe_ds.commands.named_tables import (
    TABLES,
    check_there,
    corpus_of,
    open_table,
    pieces,
    text_if_found,
    tokenizer_of,
)
from stablemoe_ds.commands.parsing import Subparsers, add_command, add_group, data_argument, json_argument, tell
from stablemoe_ds.errors import UserError


def add_to(commands: Subparsers) -> None:
    members = "build|show|diff|bounds|distil|export|import|simulate"
    table = add_group(commands, "table", "routing tables: which experts serve which id", members)
    table_build.add_to(table)
    show = add_command(table, "show", "show a table: how it was made, load, cohesion, the pieces of each expert", _show)
    show.add_argument("table", help="table file, checkpoint or run directory")
    _text_arguments(show, "the run's training text, for a checkpoint", "pieces of each expert")
    diff = add_command(
        table, "diff", "compare two tables after the best matching of their experts: what moved, load, cohesion", _diff
    )
    for name in ("one", "other"):
        diff.add_argument(name, help="table file, checkpoint or run directory")
    _text_arguments(diff, "the training text of the first run of the two, for checkpoints", "pieces that moved")
    table_bounds.add_to(table)
    table_distil.add_to(table)
    table_exchange.add_to(table)
    table_simulate.add_to(table)


def _text_arguments(parser: argparse.ArgumentParser, text: str, top: str) -> None:
    data_argument(parser, required=False, default=text)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer, to print ids as pieces; default: a checkpoint's own")
    parser.add_argument("--top", type=int, default=12, help=f"{top} (default 12)")
    json_argument(parser)


def _check_top(top: int) -> None:
    if top < 0:
        raise UserError(f"--top: got {top}: expected at least 0")


def _show(arguments: argparse.Namespace) -> int:
    _check_top(arguments.top)
    table, checkpoint = open_table(arguments.table)
    from stablemoe_ds.evaluation.table_report import facts_text, measured_facts, measured_text, table_facts

    facts = table_facts(table)
    text = facts_text(facts)
    tokenizer = tokenizer_of(arguments.tokenizer, checkpoint)
    sources, note = text_if_found(arguments.data, checkpoint)
    if sources:
        corpus = corpus_of(sources, tokenizer, table.vocab_size)
        facts["measured"] = measured_facts(table, corpus, pieces(tokenizer), arguments.top)
        text += "\n" + measured_text(facts["measured"])
    tell(facts, f"{text}\n{note}" if note else text, arguments.json)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    _check_top(arguments.top)
    for path in (arguments.one, arguments.other):
        check_there(path, TABLES)
    (one, first), (other, second) = open_table(arguments.one), open_table(arguments.other)
    from stablemoe_ds.evaluation.difference_report import difference_facts, difference_text

    tokenizer = tokenizer_of(arguments.tokenizer, first, second)
    sources, note = text_if_found(arguments.data, first or second)
    corpus = corpus_of(sources, tokenizer, one.vocab_size) if sources else None
    facts = difference_facts(one, other, corpus, pieces(tokenizer), arguments.top)
    text = difference_text(facts)
    tell(facts, f"{text}\n{note}" if note else text, arguments.json)
    return 0
