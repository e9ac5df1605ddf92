"""``stablemoe export``: a checkpoint as a folder for transformers."""

from __future__ import annotations

import argparse

from stablemoe_ds.commands.parsing import (
    Subparsers,
    add_command,
    json_argument,
    settle_libraries,
    tell,
    tokenizer_argument,
)


def add_to(commands: Subparsers) -> None:
    export = add_command(commands, "export", "write a checkpoint as a folder that transformers opens", _export)
    export.add_argument("checkpoint", help="checkpoint or run directory")
    export.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist yet")
    export.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default fp32)")
    tokenizer_argument(export)
    json_argument(export)


def _export(arguments: argparse.Namespace) -> int:
    settle_libraries(arguments.checkpoint)
    from stablemoe_ds.export.exported_folder import export

    facts, text = export(arguments.checkpoint, arguments.output, arguments.dtype, arguments.tokenizer)
    tell(facts, text, arguments.json)
    return 0
