"""Trains the runs of a suite, each in a process of its own, so that what breaks one does not end the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stablemoe_ds.comparison.suite import SuiteRun
from stablemoe_ds.comparison.suite_state import state_of
from stablemoe_ds.config.load import dump_run
from stablemoe_ds.distributed.environment import MEANT_SIZE
from stablemoe_ds.distributed.signals import StopRequest
from stablemoe_ds.errors import BAD_INPUT
from stablemoe_ds.run_directory.lock import LAUNCH, writer_of

Say = Callable[[str], None]
LAUNCHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", MEANT_SIZE, LAUNCH)
LEFT_ALONE = "skipped, another process is training it"


@dataclass(frozen=True)
class Child:
    """A run that is being trained. began: on the monotonic clock."""

    number: int
    run: SuiteRun
    process: subprocess.Popen[bytes]
    began: float


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


def threads_of_each(jobs: int) -> int:
    return max(1, cores() // jobs)


def train_all(runs: Sequence[SuiteRun], jobs: int, say: Say) -> list[SuiteRun]:
    """Train what is not finished, ``jobs`` runs at once. Returns the runs that are not finished afterwards.

    SIGINT, SIGTERM and SIGUSR1 make every run save and stop, and no other begin; a second Ctrl-C ends them at once.
    """
    stop, said_so = StopRequest(), False
    waiting = deque((number, run) for number, run in enumerate(runs, 1) if state_of(run) != "finished")
    if len(waiting) < len(runs):
        say(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already")
    unfinished = [run for _, run in waiting]
    active: list[Child] = []
    try:
        with stop.on(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            while active or (waiting and not stop.asked):
                while waiting and len(active) < jobs and not stop.asked:
                    number, run = waiting.popleft()
                    if child := _start(number, run, threads_of_each(jobs)):
                        say(f"[{number}/{len(runs)}] {run}: {state_of(run)}, log {run.sibling('log')}")
                        active.append(child)
                    else:
                        say(f"[{number}/{len(runs)}] {run}: {LEFT_ALONE}")
                if stop.asked and not said_so:
                    said_so = True
                    say(f"asked to stop: {len(active)} run(s) save first")
                    for child in active:
                        child.process.send_signal(signal.SIGUSR1)  # heard while the libraries still load, too
                time.sleep(0.1)
                for child in [child for child in active if child.process.poll() is not None]:
                    active.remove(child)
                    say(f"[{child.number}/{len(runs)}] {child.run}: {_ending(child)}")
    finally:
        for child in active:  # left only by a second Ctrl-C, or an error here
            os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()
    return [run for run in unfinished if state_of(run) != "finished"]


def _start(number: int, run: SuiteRun, threads: int) -> Child | None:
    """Train a run from its resolved YAML. None if another process does."""
    if writer_of(run.folder) is not None:
        return None
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with run.sibling("log").open("ab") as log:
        run.sibling("yaml").write_text(dump_run(run.run), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        environment = {"OMP_NUM_THREADS": str(threads), **environment, "PYTHONUNBUFFERED": "1"}
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        process = subprocess.Popen(
            [sys.executable, "-m", "stablemoe_ds", "train", str(run.sibling("yaml"))],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the run once, through us
        )
    return Child(number, run, process, time.monotonic())


def _ending(child: Child) -> str:
    code, took = child.process.returncode, f"{time.monotonic() - child.began:,.0f} s"
    if state_of(child.run) == "finished":
        return f"finished after {took}"
    if code in (0, -signal.SIGUSR1):  # the latter before it had begun to listen
        return f"stopped after {took}"
    if code == BAD_INPUT and writer_of(child.run.folder) is not None:  # it began in the same moment as this one
        return LEFT_ALONE
    lines = child.run.sibling("log").read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"FAILED after {took} with exit code {code}: {last}"
