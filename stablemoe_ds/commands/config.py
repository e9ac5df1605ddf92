"""``stablemoe config``: what a run will do and what it costs."""

from __future__ import annotations

import argparse

from stablemoe_ds.answers import answer
from stablemoe_ds.commands.parsing import Subparsers, add_command, add_group, json_argument, run_arguments, tell


def add_to(commands: Subparsers) -> None:
    config = add_group(commands, "config", "what a run will do and what it costs", "check|show")
    for name, text, call in (
        ("check", "hold a run against every rule and say what it costs", _config_check),
        ("show", "every setting of a run, defaults included", _config_show),
    ):
        sub = add_command(config, name, text, call)
        run_arguments(sub)
        sub.add_argument("--world-size", type=int, help="processes; default: the fewest the run can have")
        json_argument(sub)


def _config_check(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.config.load import load_run
    from stablemoe_ds.config.report import render, report, smallest_world
    from stablemoe_ds.config.rules import check

    run = load_run(arguments.run, arguments.overrides)
    world = smallest_world(run) if arguments.world_size is None else arguments.world_size
    check(run, world)
    facts = report(run, world)
    tell(facts, render(facts), arguments.json)
    return 0


def _config_show(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.config.load import dump_run, load_run
    from stablemoe_ds.config.report import report
    from stablemoe_ds.config.rules import check

    run = load_run(arguments.run, arguments.overrides)
    check(run, arguments.world_size)
    if arguments.json:
        tell({**report(run, arguments.world_size), "run": run.model_dump(mode="json")}, "", True)
    else:
        answer(dump_run(run), end="")
    return 0
