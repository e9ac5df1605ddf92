"""Ranks on one machine without another launcher.

    python -m stablemoe_ds.launch.local --processes 2 --port 29500 --logs DIR COMMAND ...

starts the command once a rank, one log each; rank 0 is shown as well. USR1, TERM and INT make the ranks save and stop.
When one fails the others get a moment to say that they have lost it, and are ended.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import IO

from stablemoe_ds.answers import stream
from stablemoe_ds.distributed.environment import rank_environment
from stablemoe_ds.launch.containers import contained
from stablemoe_ds.launch.job import Job, Order

SEEN_INSIDE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
GRACE_SECONDS, KILL_SECONDS = 5.0, 30.0


def local_job(order: Order) -> Job:
    """All ranks on this machine."""
    cluster = order.cluster
    words = [order.facts.python, "-m", __name__, "--processes", str(cluster.processes_per_node)]
    words += ["--port", str(order.port), "--logs", order.logs]
    inside = contained(cluster, [*SEEN_INSIDE, *order.variables, *cluster.forward], order.facts.user)
    return Job((order,), (*words, *inside, *order.command), environment=order.variables)


def run_ranks(command: Sequence[str], processes: int, port: int, logs: Path) -> int:
    """Start the command once a rank and wait for all. Returns 0, or the status of the rank that failed first."""
    logs.mkdir(parents=True, exist_ok=True)
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        # A terminal sends Ctrl-C to the ranks as well, and the second one would end them at once.
        asks = signal.SIGUSR1 if number == signal.SIGINT else number
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(asks)

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    with ExitStack() as stack:
        for rank in range(processes):
            log = stack.enter_context((logs / f"rank-{rank}.log").open("ab"))
            environment = {**os.environ, **rank_environment(rank, processes, port)}
            said = subprocess.PIPE if rank == 0 else log
            process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
            ranks.append(process)
            if process.stdout is not None:
                reader = threading.Thread(target=_show, args=(process.stdout, log), daemon=True)
                reader.start()
        code = _wait(ranks)
        reader.join(GRACE_SECONDS)
    return code


def _show(source: IO[bytes], log: IO[bytes]) -> None:
    """Copy what a rank says into its log and onto the terminal, as it comes."""
    while text := os.read(source.fileno(), 1 << 16):
        log.write(text)
        log.flush()
        stream().buffer.write(text)
        stream().buffer.flush()


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    failed, since = 0, 0.0
    while running := [rank for rank in ranks if rank.poll() is None]:
        if not failed and (failed := next((rank.returncode for rank in ranks if rank.returncode), 0)):
            since = time.monotonic()
        waited = time.monotonic() - since if failed else 0.0
        for rank in running:
            if waited > GRACE_SECONDS + KILL_SECONDS:
                rank.kill()
            elif waited > GRACE_SECONDS:
                rank.terminate()
        time.sleep(0.05)
    failed = failed or next((rank.returncode for rank in ranks if rank.returncode), 0)
    return failed if failed >= 0 else 128 - failed


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status of the ranks."""
    parser = argparse.ArgumentParser(prog="python -m stablemoe_ds.launch.local", description="Ranks on one machine.")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(argv)
    if shutil.which(given.command[0]) is None:
        print(f"stablemoe: error: there is no program {given.command[0]}", file=sys.stderr)
        return 2
    return run_ranks(given.command, given.processes, given.port, given.logs)


if __name__ == "__main__":
    sys.exit(main())
