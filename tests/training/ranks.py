"""Ranks of a run as processes of their own that may break: ``stablemoe train`` in each, with a fault in one of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from stablemoe_ds.cli import main
from tests.distributed.launch import start_ranks
from tests.waiting import PATIENCE

ENDING = 20.0
"""Seconds until nothing is left of a rank that has ended: its readers look for it every five."""
Fault = Callable[[], None]
"""Prepared in a rank before its training begins. A function of a module, so that it can be sent there."""


def _rank(log: Path, environment: dict[str, str], argv: list[str], fault: Fault | None) -> None:
    os.setsid()  # so that whatever this rank starts can be found
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(out, number)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # for readers, as in a process that a launcher has started
    if fault is not None:
        fault()
    main(argv)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, by rank."""

    processes: list[BaseProcess]
    logs: list[Path]

    def wait(self, *ranks: int) -> None:
        """Until these ranks (all, if none are named) have ended."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].join(PATIENCE)
            assert self.processes[rank].exitcode is not None, f"rank {rank} goes on:\n{self.said(rank)}"

    @property
    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text(errors="replace")

    def error(self, rank: int) -> str:
        """The line a rank ended with."""
        (line,) = (line for line in self.said(rank).splitlines() if line.startswith("stablemoe"))
        return line

    def signal(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def left_over(self) -> list[int]:
        """Processes of these ranks' sessions that still run."""
        sessions = {process.pid for process in self.processes}
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) in sessions and state != "Z":
                found.append(int(entry.name))
        return found


@contextmanager
def started(
    folder: Path, argvs: list[list[str]], faults: dict[int, Fault], **environment: dict[int, str]
) -> Iterator[Ranks]:
    """One rank for each list of arguments. environment: variables by rank, laid over what a launcher would set."""
    logs = [folder / f"rank-{rank}.txt" for rank in range(len(argvs))]
    laid_over = [{name: by[rank] for name, by in environment.items() if rank in by} for rank in range(len(argvs))]
    processes = start_ranks(
        _rank, [(log, laid_over[rank], argvs[rank], faults.get(rank)) for rank, log in enumerate(logs)]
    )
    ranks = Ranks(processes, logs)
    try:
        yield ranks
        end = time.monotonic() + ENDING
        while ranks.left_over() and time.monotonic() < end:
            time.sleep(0.05)
        assert ranks.left_over() == []
    finally:
        for pid in ranks.left_over():
            os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.join()
