"""A table from a file that a run follows or starts from: it has to be of its tokenizer and of its model's shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.table import RoutingTable
from stablemoe_ds.tables.table_file import FOREIGN, read_table

ANOTHER = "'stablemoe table build' makes one"


def given_table(
    path: str | Path,
    *,
    experts: int,
    top_k: int,
    blocks: tuple[int, ...],
    vocab_size: int | None,
    tokenizer: str | None,
    key: str = "moe.table",
) -> RoutingTable:
    """The table in a file, its layers in order at the blocks of this model, which need not be those it was made for.

    Of a table of more layers those of the same blocks are taken, if it has all of them.

    blocks: numbers of the blocks whose MoE layer follows it. vocab_size, tokenizer: ids and fingerprint of the run's
    tokenizer, "" for a run without one; None: not known, not checked. key: the setting that names the file.
    Raises UserError if the file is missing or damaged, and with a line for each thing that does not fit the run.
    """
    try:
        table = read_table(path, experts)
    except UserError as error:
        raise UserError(f"{key}: {error}; {ANOTHER}") from error
    if len(table.blocks) > len(blocks) and set(blocks) <= set(table.blocks):
        table = table.only(blocks)
    if problems := [
        f"{key}: {path} {problem}" for problem in _problems(table, experts, top_k, blocks, vocab_size, tokenizer)
    ]:
        raise UserError("\n".join(problems))
    return replace(table, blocks=blocks)


def _problems(
    table: RoutingTable,
    experts: int,
    top_k: int,
    blocks: tuple[int, ...],
    vocab_size: int | None,
    tokenizer: str | None,
) -> Iterator[str]:
    # Files of others do not name a tokenizer: only the number of ids can be checked.
    unnamed = not table.tokenizer and table.made.get("builder") in FOREIGN
    if tokenizer is not None and table.tokenizer != tokenizer and not unnamed:
        yield (
            f"is for ids of {_named(table.tokenizer)}, but the run has {_named(tokenizer)}, whose ids mean other "
            f"pieces: expected a table for that; {ANOTHER}"
        )
    if vocab_size is not None and table.vocab_size != vocab_size:
        yield f"has {table.vocab_size} ids, but model.vocab_size is {vocab_size}: expected the same; {ANOTHER}"
    if table.experts != experts:
        yield f"is for {table.experts} experts, but moe.experts is {experts}; nearest that works: {table.experts}"
    if table.top_k != top_k:
        yield f"gives an id {table.top_k} experts, but moe.top_k is {top_k}; nearest that works: {table.top_k}"
    if len(table.blocks) != len(blocks):
        yield f"has the layers of blocks {list(table.blocks)}, but the run follows it at {list(blocks)}; {ANOTHER}"


def _named(tokenizer: str) -> str:
    return f"tokenizer {tokenizer[:12]}" if tokenizer else "no tokenizer"
