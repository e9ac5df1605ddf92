"""``stablemoe table simulate``: what a run that follows a table asks of ranks and links, before it is started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from stablemoe_ds.commands.named_tables import check_there
from stablemoe_ds.commands.parsing import (
    Subparsers,
    add_command,
    json_argument,
    run_arguments,
    settle_libraries,
    tell,
)
from stablemoe_ds.errors import UserError


def add_to(table: Subparsers) -> None:
    text = "rows, bytes and waiting of every rank in every update of a run, computed from data order and table"
    simulate = add_command(table, "simulate", text, _simulate)
    run_arguments(simulate)
    simulate.add_argument(
        "--table", type=Path, metavar="T", help="table file to follow; default: the run's own, given or frozen"
    )
    simulate.add_argument(
        "--ranks", type=int, metavar="R", help="processes; default: the smallest number that the run allows"
    )
    simulate.add_argument("--nodes", type=int, default=1, metavar="M", help="nodes that the ranks are on (default 1)")
    simulate.add_argument(
        "--first", type=int, metavar="U", help="first update; default: the first that follows a table"
    )
    simulate.add_argument("--updates", type=int, metavar="U", help="number of updates; default: to the end of the run")
    simulate.add_argument("--output", type=Path, metavar="FILE.jsonl", help="write a line of JSON for each update")
    json_argument(simulate)


def _simulate(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.config.cost_report import smallest_world
    from stablemoe_ds.config.load import load_run
    from stablemoe_ds.config.rules import switch_step

    run = load_run(arguments.run, arguments.overrides)
    ranks = smallest_world(run.parallel) if arguments.ranks is None else arguments.ranks
    first = (switch_step(run) or 0) + 1 if arguments.first is None else arguments.first
    _check({"--ranks": ranks, "--nodes": arguments.nodes, "--first": first})
    if first > run.schedule.steps:
        raise UserError(f"--first: got {first}: the run has {run.schedule.steps} updates")
    updates = run.schedule.steps + 1 - first if arguments.updates is None else arguments.updates
    _check({"--updates": updates})
    _check_nodes(ranks, arguments.nodes)
    if arguments.table is not None:
        check_there(arguments.table, "a table file")
    settle_libraries()
    from stablemoe_ds.config.resolved import resolve
    from stablemoe_ds.data.corpus import token_counts
    from stablemoe_ds.data.tokenizer import Tokenizer
    from stablemoe_ds.progress_bar import progress_bar
    from stablemoe_ds.training.followed_table import followed_table
    from stablemoe_ds.training.simulation import Layout, simulate
    from stablemoe_ds.training.simulation_report import Summary, summary_facts, summary_text, update_facts

    tokenizer = Tokenizer(run.data.tokenizer) if run.data.tokenizer else None
    resolved = resolve(run, ranks, (tokenizer.vocab_size, tokenizer.eos_id) if tokenizer else None)
    table = followed_table(resolved, tokenizer, arguments.table)
    load_LN = table.expert_load(token_counts(run.data.train, tokenizer, resolved.vocab_size))
    layout = Layout.of(resolved, arguments.nodes, load_LN)
    summary = Summary()
    with _lines(arguments.output) as file, progress_bar("updates", updates) as done:
        for update in simulate(resolved, table, layout, range(first, first + updates), tokenizer):
            summary.add(update)
            if file is not None:
                file.write(json.dumps(update_facts(update)) + "\n")
            done(1)
    facts = summary_facts(summary, resolved, table, layout, load_LN)
    said = summary_text(facts) + (f"\nwrote {arguments.output}" if arguments.output else "")
    tell(facts, said, arguments.json)
    return 0


def _check(numbers: dict[str, int]) -> None:
    """Raise UserError, a line for each number that is out of range."""
    if problems := [f"{name}: got {number}: expected at least 1" for name, number in numbers.items() if number < 1]:
        raise UserError("\n".join(problems))


def _check_nodes(ranks: int, nodes: int) -> None:
    """Raise UserError if the nodes would have unequal numbers of ranks."""
    if ranks % nodes:
        nearest = min((n for n in range(1, ranks + 1) if ranks % n == 0), key=lambda n: abs(n - nodes))
        raise UserError(f"--nodes: got {nodes}: each has as many of the {ranks} ranks; nearest that works: {nearest}")


@contextmanager
def _lines(path: Path | None) -> Iterator[IO[str] | None]:
    """The file to write lines to, if one is named. Raises UserError if that is impossible."""
    if path is None:
        yield None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
