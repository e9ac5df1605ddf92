"""Run a function in several processes of this machine and get what each rank returns."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from stablemoe_ds.distributed.environment import free_port, rank_environment
from stablemoe_ds.training import throughput

GRACE_SECONDS = 3.0
"""How long the other ranks may go on once one has failed: enough to write down their own failure."""
PRELOADED = [
    "stablemoe_ds.training.trainer",
    "stablemoe_ds.evaluation.trained_model",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.pyplot",
    "tests.distributed.launch",
]
"""What almost every rank imports: the trainer, and what is imported only when an engine is built or a run reports."""


class RankError(AssertionError):
    """The traceback of every rank that failed."""

    def __init__(self, reports: dict[int, tuple[int | None, str]]) -> None:
        """reports: exit code and traceback by rank; no traceback where a rank was stopped because of another."""
        super().__init__(
            "\n".join(
                f"--- rank {rank}, exit code {code}\n{text or 'stopped because another rank failed'}"
                for rank, (code, text) in reports.items()
            )
        )


def run_distributed(ranks: int, target: Callable[..., Any], *args: Any, timeout: float = 200.0) -> list[Any]:
    """Call ``target(*args)``, a function of a module, in ``ranks`` processes; returns the results by rank.

    Raises RankError with the traceback of every rank that failed, or with where each rank stands if the call
    takes longer than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = start_ranks(_rank, [(folder / str(rank), timeout, target, args) for rank in range(ranks)])
        _join(processes, timeout + GRACE_SECONDS)
        if codes := {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode != 0}:
            raise RankError({rank: (code, _said(folder / f"{rank}.txt")) for rank, code in codes.items()})
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def start_ranks(target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> list[BaseProcess]:
    """One process for each tuple of arguments, started, with one thread and the variables that a launcher would set."""
    # Ranks are forked from a server that has imported the heavy libraries once: 0.1 s a rank instead of 6 s.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port, ranks = free_port(), len(arguments)
    processes: list[BaseProcess] = [
        context.Process(target=_as_rank, args=(rank_environment(rank, ranks, port), target, given))
        for rank, given in enumerate(arguments)
    ]
    for process in processes:
        process.start()
    return processes


def _as_rank(environment: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    # No test asks a rank how fast this machine is, and without AVX-512 one product in bf16 takes 2.5 s.
    throughput._measured_flops = lambda _device, _dtype: 1e9
    target(*arguments)


def _rank(output: Path, timeout: float, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    report = output.with_suffix(".txt").open("w")
    faulthandler.dump_traceback_later(timeout, exit=True, file=report)
    try:
        result = target(*args)
    except BaseException:
        traceback.print_exc(file=report)
        report.flush()
        os._exit(1)  # not waiting for the other ranks in some destructor
    torch.save(result, output.with_suffix(".pt"))


def _join(processes: list[BaseProcess], seconds: float) -> None:
    """Wait for all to end; once one has failed, only a little longer."""
    end = time.monotonic() + seconds
    running = list(processes)
    try:
        while running and time.monotonic() < end:
            wait([process.sentinel for process in running], timeout=end - time.monotonic())
            if any(process.exitcode for process in running):
                end = min(end, time.monotonic() + GRACE_SECONDS)
            running = [process for process in running if process.exitcode is None]
    finally:  # a rank may have readers, so it is no daemon, which would end with us
        for process in running:
            process.kill()
            process.join()


def _said(report: Path) -> str:
    return report.read_text() if report.exists() else ""
