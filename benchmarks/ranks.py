"""Measuring in several processes of this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from stablemoe_ds.distributed.groups import Groups, start_world, stop_world
from tests.distributed.launch import run_distributed

Measure = Callable[..., Any]
LONGEST_SECONDS = 24 * 3600.0


def on_ranks(ranks: int, measure: Measure, *arguments: Any) -> Any:
    """Call ``measure(groups, *arguments)`` in ``ranks`` processes that share the experts.

    Returns what it returns on rank 0. Raises RankError.
    """
    return run_distributed(ranks, _measured, ranks, measure, arguments, timeout=LONGEST_SECONDS)[0]


def _measured(ranks: int, measure: Measure, arguments: tuple[Any, ...]) -> Any:
    multiprocessing.set_start_method("fork", force=True)  # for a loader's workers, as in a run
    found = measure(Groups(start_world(), tensor=1, expert=ranks), *arguments)
    stop_world()
    return found
