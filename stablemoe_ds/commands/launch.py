"""``stablemoe launch``, ``status`` and ``logs``."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from stablemoe_ds.answers import answer, stream
from stablemoe_ds.commands.parsing import Subparsers, add_command, json_argument
from stablemoe_ds.errors import UserError

FOLLOW_SECONDS = 0.5


def add_to(commands: Subparsers) -> None:
    start = add_command(commands, "launch", "train runs on a cluster or this machine; restart after faults", launch)
    start.add_argument(
        "runs", nargs="+", metavar="RUN.yaml | key=value", help="runs, then settings that override those of each run"
    )
    start.add_argument("--cluster", required=True, metavar="CLUSTER.yaml", help="cluster file; launch/ has examples")
    how = start.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="print what would be written and run, as a shell script")
    how.add_argument("--submit", action="store_true", help="refuse a launcher without a queue; slurm submits anyway")

    state = add_command(commands, "status", "show the state of launched runs", show_status)
    state.add_argument("run", nargs="?", metavar="RUN_DIR | RUN.yaml", help="default: all under runs/")
    json_argument(state)

    said = add_command(commands, "logs", "show the log of a rank", show_logs)
    said.add_argument("run", metavar="RUN_DIR | RUN.yaml")
    said.add_argument("--rank", type=int, default=0, help="default: 0, which logs the progress")
    said.add_argument("--follow", action="store_true", help="keep printing until Ctrl-C")


def launch(arguments: argparse.Namespace) -> int:
    """Print, submit or run; returns an exit status."""
    from stablemoe_ds.config.load import load_run
    from stablemoe_ds.launch.cluster import load_cluster
    from stablemoe_ds.launch.make_jobs import look_around, make_jobs
    from stablemoe_ds.launch.start import start

    files = [word for word in arguments.runs if "=" not in word or Path(word).is_file()]
    overrides = [word for word in arguments.runs if word not in files]
    if not files:
        raise UserError("launch: no RUN.yaml given, only settings")
    cluster = load_cluster(arguments.cluster)
    if arguments.submit and cluster.launcher != "slurm":
        raise UserError(f"--submit: launcher {cluster.launcher} has no queue; omit --submit to run it here")
    jobs = make_jobs([load_run(path, overrides) for path in files], cluster, look_around())
    if arguments.dry_run:
        answer("\n".join(job.as_shell() for job in jobs), end="")
        return 0
    return start(jobs)


def show_status(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.launch.status import render, run_directories, status

    found = [status(run_dir) for run_dir in run_directories(arguments.run)]
    answer(json.dumps(found, indent=1) if arguments.json else render(found))
    return 0


def show_logs(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.launch.logs import Tail, require_logs
    from stablemoe_ds.launch.status import logs_of, run_directories

    (run_dir,) = run_directories(arguments.run)
    logs = logs_of(run_dir)
    if not arguments.follow:
        require_logs(logs, arguments.rank)
    tail = Tail(logs, arguments.rank)
    while True:
        for text in tail.new():
            stream().buffer.write(text)
        stream().flush()
        if not arguments.follow:
            return 0
        time.sleep(FOLLOW_SECONDS)
