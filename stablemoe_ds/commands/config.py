"""``stablemoe config``: what a run will do and what it costs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from stablemoe_ds.answers import answer
from stablemoe_ds.commands.parsing import Subparsers, add_command, add_group, json_argument, run_arguments, tell
from stablemoe_ds.errors import UserError

if TYPE_CHECKING:
    from stablemoe_ds.config.schema import RunConfig
    from stablemoe_ds.data.named_files import NamedFile


def add_to(commands: Subparsers) -> None:
    config = add_group(commands, "config", "what a run will do and what it costs", "check|show|matrix")
    for name, text, call in (
        ("check", "check a run and the files it names against every rule, and print what it costs", _config_check),
        ("show", "every setting of a run, defaults included", _config_show),
    ):
        sub = add_command(config, name, text, call)
        run_arguments(sub)
        sub.add_argument("--world-size", type=int, help="processes; default: the fewest the run can have")
        json_argument(sub)
    text = "what of a run's layout works with what"
    json_argument(add_command(config, "matrix", text, _config_matrix))


def _config_check(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.config.cost_report import render, report, smallest_world
    from stablemoe_ds.config.load import load_run

    run = load_run(arguments.run, arguments.overrides)
    world = smallest_world(run.parallel) if arguments.world_size is None else arguments.world_size
    run, files = _checked(run, world)
    facts = {**report(run, world), "files": [file.as_dict() for file in files]}
    tell(facts, render(facts), arguments.json)
    return 0


def _config_show(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.config.cost_report import report
    from stablemoe_ds.config.load import dump_run, load_run
    from stablemoe_ds.config.rules import check

    run = load_run(arguments.run, arguments.overrides)
    if arguments.json:
        known, _ = _checked(run, arguments.world_size)
        tell({**report(known, arguments.world_size), "run": run.model_dump(mode="json")}, "", True)
    else:
        check(run, arguments.world_size)
        answer(dump_run(run), end="")
    return 0


def _config_matrix(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.config.compatibility import facts, render

    tell(facts(), render(), arguments.json)
    return 0


def _checked(run: RunConfig, world_size: int | None) -> tuple[RunConfig, list[NamedFile]]:
    """The run with the tokenizer's vocabulary if that can be read, and the files it names.

    Raises UserError with a line for each breach of a rule and each file that ``train`` would refuse; a file that is
    not here is no error, as the run may be meant for another machine.
    """
    from stablemoe_ds.config.rules import check, with_vocabulary
    from stablemoe_ds.data.named_files import look_at_files

    files, tokenizer_size = look_at_files(run)
    problems = [f"{file.key}: {file.found}" for file in files if file.state == "unusable"]
    try:
        if tokenizer_size is not None:
            run = with_vocabulary(run, tokenizer_size)
    except UserError as error:
        problems.append(str(error))
    try:
        check(run, world_size)
    except UserError as error:
        problems += [line for line in str(error).splitlines() if line not in problems]
    if problems:
        raise UserError("\n".join(problems))
    return run, files
