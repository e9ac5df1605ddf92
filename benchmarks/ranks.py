"""Measuring in several processes of this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stablemoe_ds.distributed.groups import Groups, start_world, stop_world

Measure = Callable[..., Any]


def on_every_rank(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function of a module in ``ranks`` processes with one thread each, as torchrun starts them.

    Returns what each rank returns. Raises torch's ChildFailedError if one fails.
    """
    # Without a GPU, which a process cannot inherit, ranks are forked from one that has imported the libraries.
    multiprocessing.set_forkserver_preload(["benchmarks.common", "stablemoe_ds.training.engine"])
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="benchmark",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn" if torch.cuda.is_available() else "forkserver",
    )
    returned = elastic_launch(config, _with_one_thread)(function, arguments)
    return [returned[rank] for rank in range(ranks)]


def on_ranks(ranks: int, measure: Measure, *arguments: Any) -> Any:
    """What ``measure(groups, *arguments)`` returns on rank 0 of ``ranks`` processes that share the experts.

    Raises ChildFailedError.
    """
    return on_every_rank(ranks, _measured, ranks, measure, arguments)[0]


def reason(error: ChildFailedError) -> str:
    """What the first rank that failed says of it, on one line."""
    said: Any = error.get_first_failure()[1].message  # a dict for an exception, text for a signal
    text = said["message"] if isinstance(said, dict) else said
    return text.strip().splitlines()[-1]


def _with_one_thread(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    return function(*arguments)


def _measured(ranks: int, measure: Measure, arguments: tuple[Any, ...]) -> Any:
    multiprocessing.set_start_method("fork", force=True)  # for a loader's workers, as in a run
    found = measure(Groups(start_world(), tensor=1, expert=ranks), *arguments)
    stop_world()
    return found
