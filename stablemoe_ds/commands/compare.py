"""``stablemoe compare``: a suite of runs that differ in one thing."""

from __future__ import annotations

import argparse

from stablemoe_ds.answers import answer
from stablemoe_ds.commands.parsing import Subparsers, add_command
from stablemoe_ds.errors import UserError


def add_to(commands: Subparsers) -> None:
    compare = add_command(commands, "compare", "train a suite of variants and seeds, and compare them", _compare)
    compare.add_argument("suite", metavar="SUITE.yaml")
    compare.add_argument("--only", nargs="+", metavar="VARIANT", help="train these variants only")
    how = compare.add_mutually_exclusive_group()
    how.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, sharing the cores (default 1)")
    how.add_argument("--cluster", metavar="CLUSTER.yaml", help="train on this cluster, as `stablemoe launch` does")
    how.add_argument("--report", action="store_true", help="only write tables and plots of the finished runs")
    compare.add_argument("--dry-run", action="store_true", help="print one command per run and start nothing")


def _compare(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.comparison.suite import load_suite

    suite = load_suite(arguments.suite)
    runs = suite.runs if arguments.only is None else suite.only(arguments.only)
    if arguments.jobs < 1:
        raise UserError(f"--jobs: got {arguments.jobs}: expected at least 1")
    if arguments.cluster:
        from stablemoe_ds.comparison.launch_suite import launch_all

        return launch_all(runs, arguments.cluster, arguments.dry_run)
    if arguments.dry_run:
        answer("\n".join(run.command for run in runs))
        return 0
    from stablemoe_ds.comparison.compare_suite import compare, report

    return report(suite) if arguments.report else compare(suite, runs, arguments.jobs)
