"""``stablemoe table distil``: which layers of a trained model may become tables."""

from __future__ import annotations

import argparse
from pathlib import Path

from stablemoe_ds.commands.named_tables import check_load, write_table
from stablemoe_ds.commands.parsing import Subparsers, add_command, json_argument, settle_libraries, tell


def add_to(table: Subparsers) -> None:
    text = "how much of each layer's routing ids explain, and the perplexity with that layer frozen to a table"
    distil = add_command(table, "distil", text, _distil)
    distil.add_argument("checkpoint", help="checkpoint or run directory, of a model whose routers learn")
    for name, what, default in (
        ("--data", "to watch the routers on", "the run's training text"),
        ("--heldout", "to measure perplexity on", "the run's validation text"),
    ):
        said = f"prepared corpora (paths without ending) {what}; default: {default}"
        distil.add_argument(name, nargs="+", default=[], metavar="PREFIX", help=said)
    distil.add_argument("--max-load", type=float, help="largest max/mean load of a table; default: as it comes")
    distil.add_argument("--output", type=Path, help="write the tables of all these layers, for moe.table")
    json_argument(distil)


def _distil(arguments: argparse.Namespace) -> int:
    check_load(arguments.max_load)
    settle_libraries(arguments.checkpoint)
    from stablemoe_ds.evaluation.layer_tables import distil_layers, layers_text

    facts, table = distil_layers(arguments.checkpoint, arguments.data, arguments.heldout, arguments.max_load)
    said = layers_text(facts)
    if arguments.output:
        write_table(table, arguments.output)
        said += f"\nwrote {arguments.output}"
    tell(facts, said, arguments.json)
    return 0
