"""What the command files share: parsers, arguments that recur, answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stablemoe_ds.answers import answer

Subparsers = Any
"""What ``add_subparsers`` returns, whose type is private to argparse."""
Command = Callable[[argparse.Namespace], int]
"""Does what was asked; returns the exit status."""


def add_command(commands: Subparsers, name: str, text: str, call: Command) -> argparse.ArgumentParser:
    """A parser of its own for one command, whose arguments go to ``call``."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(call=call)
    return parser


def add_group(commands: Subparsers, name: str, text: str, members: str) -> Subparsers:
    """A command that has commands of its own; ``members`` names them in the usage line."""
    return commands.add_parser(name, help=text).add_subparsers(required=True, metavar=members)


def run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. schedule.steps=100")


def json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def data_argument(parser: argparse.ArgumentParser, required: bool, default: str = "") -> None:
    """``--data`` for one text of several corpora. default: what is taken where none is named, in words."""
    text = "prepared corpora (paths without extension), in equal parts" + (f"; default: {default}" if default else "")
    parser.add_argument("--data", nargs="+", required=required, default=[], metavar="PREFIX", help=text)


def tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer for a checkpoint that contains none")


def tell(facts: Any, text: str, as_json: bool) -> None:
    """Print on the main rank only: JSON for a script, text for a person."""
    from stablemoe_ds.distributed.environment import read_launcher_environment

    rank, _, _ = read_launcher_environment()
    if rank == 0:
        answer(json.dumps(facts, indent=1) if as_json else text)


def settle_libraries(*checkpoints: str | Path) -> None:
    """Before the first import of torch: see :mod:`stablemoe_ds.distributed.libraries`.

    checkpoints: what the command is going to open. Raises UserError for one that is not there: loading torch takes
    seconds, which nobody should wait for the answer that a path is wrong.
    """
    from stablemoe_ds.distributed import libraries
    from stablemoe_ds.run_directory.checkpoint_files import find_checkpoint

    for path in checkpoints:
        find_checkpoint(path)
    libraries.settle_libraries()
