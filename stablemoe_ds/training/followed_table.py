"""The table that a run follows or would follow, without its model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from stablemoe_ds.config.resolved import ResolvedRun
from stablemoe_ds.config.rules import two_stages
from stablemoe_ds.data.corpus import token_counts
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError
from stablemoe_ds.routing.source import RouteMaker
from stablemoe_ds.run_directory.rewind import TABLE
from stablemoe_ds.tables.given import given_table
from stablemoe_ds.tables.table import RoutingTable
from stablemoe_ds.training.built_table import built_table


def followed_table(resolved: ResolvedRun, tokenizer: Tokenizer | None, path: Path | None) -> RoutingTable:
    """The table in a file; without one, what the run follows from its first update, or what its switch has frozen.

    Of a run in which some layers follow a table while others learn, it is that of the former, until its switch.

    path: a table file to follow in place of the run's own; needed for a run that has not learned its routing yet.
    Raises UserError if there is no table, or if it does not fit the run.
    """
    run, moe = resolved.run, resolved.run.moe
    fingerprint = tokenizer.fingerprint if tokenizer else ""
    if not moe.facts.routed or not moe.layers:
        raise UserError(f"moe.router: got {moe.router}: the run has no experts, so there is nothing to simulate")
    file, blocks = Path(run.directory) / TABLE, moe.fixed_layers or moe.layers
    if path is None and two_stages(run) and file.exists() and RoutingTable.read(file).blocks == tuple(moe.layers):
        path, blocks = file, moe.layers
    if path is not None:
        shape = {"experts": moe.experts, "top_k": moe.top_k, "blocks": tuple(blocks)}
        return given_table(path, **shape, vocab_size=resolved.vocab_size, tokenizer=fingerprint)  # type: ignore[arg-type]
    if not moe.fixed_layers:
        raise UserError(
            f"moe.router: got {moe.router}, which learns where tokens go, and there is no {file}: name a table "
            "with --table, e.g. one that 'stablemoe table build' makes from the text or from a checkpoint"
        )
    build = partial(built_table, run, resolved.vocab_size, tokenizer, lambda _: None)
    counts = partial(token_counts, run.data.train, tokenizer, resolved.vocab_size)
    maker = RouteMaker(run, (), counts, fingerprint, build=build)
    table = maker.frozen().table if moe.facts.fixed else maker.learning().table
    assert table is not None
    return table
