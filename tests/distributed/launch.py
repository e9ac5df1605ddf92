"""Run a function in several processes over gloo and get what each rank returns."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from stablemoe_ds.distributed.environment import free_port

GRACE_SECONDS = 3.0
"""How long the other ranks may go on once one has failed: enough to write down their own failure."""


def run_distributed(ranks: int, target: Callable[..., Any], *args: Any, timeout: float = 200.0) -> list[Any]:
    """Call ``target(*args)``, a function of a module, in ``ranks`` processes; returns the results by rank.

    Raises AssertionError with the traceback of every rank that failed, or with where each rank stands if the call
    takes longer than ``timeout`` seconds.
    """
    # Ranks are forked from a server that has imported the heavy libraries once: 0.1 s a rank instead of 5 s.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stablemoe_ds.training.engine", "tests.distributed.launch"])
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_rank, args=(rank, ranks, port, folder, timeout, target, args), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        _join(processes, timeout + GRACE_SECONDS)
        failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0]
        if failed:
            raise AssertionError("\n".join(_report(rank, processes[rank], folder) for rank in failed))
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, port: int, folder: Path, timeout: float, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    report = (folder / f"{rank}.txt").open("w")
    faulthandler.dump_traceback_later(timeout, exit=True, file=report)
    try:
        result = target(*args)
    except BaseException:
        traceback.print_exc(file=report)
        report.flush()
        os._exit(1)  # not waiting for the other ranks in some destructor
    torch.save(result, folder / f"{rank}.pt")


def _join(processes: list[BaseProcess], seconds: float) -> None:
    """Wait for all to end; once one has failed, only a little longer."""
    end = time.monotonic() + seconds
    running = list(processes)
    while running and time.monotonic() < end:
        wait([process.sentinel for process in running], timeout=end - time.monotonic())
        if any(process.exitcode for process in running):
            end = min(end, time.monotonic() + GRACE_SECONDS)
        running = [process for process in running if process.exitcode is None]
    for process in running:
        process.kill()
        process.join()


def _report(rank: int, process: BaseProcess, folder: Path) -> str:
    file = folder / f"{rank}.txt"
    text = file.read_text() if file.exists() else ""
    return f"--- rank {rank}, exit code {process.exitcode}\n{text or 'stopped because another rank failed'}"
