"""``stablemoe train``: one process's part in a run."""

from __future__ import annotations

import argparse
import signal
import sys

from stablemoe_ds.commands.parsing import Subparsers, add_command, run_arguments, settle_libraries
from stablemoe_ds.errors import RunError


def add_to(commands: Subparsers) -> None:
    train = add_command(commands, "train", "train a run, under any launcher or alone", _train)
    run_arguments(train)


def _train(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.config.load import load_run
    from stablemoe_ds.config.rules import check
    from stablemoe_ds.distributed.signals import StopRequest

    run = load_run(arguments.run, arguments.overrides)
    check(run)
    stop = StopRequest()
    with stop.on(signal.SIGUSR1):  # schedulers send it when time is short, which may be while the libraries load
        settle_libraries()
        from stablemoe_ds.distributed.groups import start_world, stop_world
        from stablemoe_ds.training.trainer import train

        world = start_world(run.parallel.timeout_minutes)
        try:
            train(run, world, stop)
        finally:
            if not isinstance(sys.exception(), RunError):  # the others may have gone without a word
                stop_world()
    return 0
