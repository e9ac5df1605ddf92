"""``stablemoe demo``: the whole story on this machine."""

from __future__ import annotations

import argparse

from stablemoe_ds.commands.parsing import Subparsers, add_command, settle_libraries


def add_to(commands: Subparsers) -> None:
    demo = add_command(commands, "demo", "the whole story on this machine, in minutes", _demo)
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="laid over ds_configs/demo.yaml")


def _demo(arguments: argparse.Namespace) -> int:
    settle_libraries()
    from stablemoe_ds.commands.demonstration import demo

    return demo(arguments.overrides)
