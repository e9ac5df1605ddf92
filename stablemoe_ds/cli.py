"""The ``stablemoe`` command: collects the files in ``commands/``, calls one, turns errors into one-line messages."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from stablemoe_ds.answers import nobody_listens, reserve_stdout, stream
from stablemoe_ds.errors import RunError, UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 bad input, 130 interrupted; 1 and 3 when a run breaks (launch/restart.py)."""
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = "; settings go right behind RUN.yaml, before any option" if any("=" in word for word in unknown) else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    with reserve_stdout():
        code = _call(arguments)
    sys.exit(code)


def _call(arguments: argparse.Namespace) -> int:
    """The exit status of a command."""
    try:
        code: int = arguments.call(arguments)
        stream().flush()
        return code
    except UserError as error:
        stream().flush()
        print(_error_text(error), file=sys.stderr, flush=True)
        return 2
    except RunError as fault:
        stream().flush()
        print(f"stablemoe: error: {fault}", file=sys.stderr, flush=True)
        _leave_at_once(fault.exit_code)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        nobody_listens()
        return 0


def _leave_at_once(code: int) -> NoReturn:
    """End the process and the readers it has started; threads and libraries might wait for ranks that are gone."""
    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _error_text(error: UserError) -> str:
    from stablemoe_ds.distributed.environment import read_launcher_environment

    rank, _, _ = read_launcher_environment()
    who = f" (rank {rank})" if rank else ""
    return f"stablemoe{who}: error: {error}"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands, in the order in which a user needs them."""
    from stablemoe_ds.commands import (
        checkpoint,
        compare,
        config,
        data,
        demo,
        doctor,
        eval_and_generate,
        export_model,
        launch,
        routing,
        tables,
        train,
    )

    parser = argparse.ArgumentParser(
        prog="stablemoe",
        description="Train Mixture-of-Experts language models whose routing is learned first and never moves again.",
    )
    # The deepspeed launcher passes it, before everything else; LOCAL_RANK says it, too.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    groups = (
        demo,
        data,
        train,
        eval_and_generate,
        export_model,
        routing,
        tables,
        checkpoint,
        config,
        launch,
        compare,
        doctor,
    )
    for group in groups:
        group.add_to(commands)
    return parser


if __name__ == "__main__":
    main()
