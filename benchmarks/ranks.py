"""Measuring in several processes of this machine."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stablemoe_ds.distributed.environment import free_port
from stablemoe_ds.distributed.groups import Groups, start_world, stop_world

Measure = Callable[..., Any]


def on_ranks(ranks: int, measure: Measure, *arguments: Any) -> Any:
    """Call ``measure(groups, *arguments)`` in ``ranks`` processes that share the experts.

    Returns what it returns on rank 0, by way of JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        result = Path(folder) / "result.json"
        torch.multiprocessing.spawn(_rank, (ranks, port, result, measure, arguments), nprocs=ranks)
        return json.loads(result.read_text())


def _rank(rank: int, ranks: int, port: int, result: Path, measure: Measure, arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.multiprocessing.set_start_method("fork", force=True)  # for a loader's workers, as in a run
    torch.set_num_threads(1)
    found = measure(Groups(start_world(), tensor=1, expert=ranks), *arguments)
    if rank == 0:
        result.write_text(json.dumps(found))
    stop_world()
