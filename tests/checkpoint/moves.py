"""What a rank does in the tests of moves: train under one layout, take what was saved to another, say the next loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.routing.source import LEARNED, RouteMaker
from tests.distributed.cases import batch
from tests.distributed.worker import engine_of, set_weights, share
from tests.training.runs import save_here

UPDATES: list[Batch] = [batch(seed) for seed in (1, 2)]
NEXT: Batch = batch(3)


def train_here(run: RunConfig, frozen: bool = False, table: Any = None) -> float:
    """Two updates, a checkpoint, and the loss of the third. frozen: along the table that is frozen before it.

    table: of the layers that follow one from the first update.
    """
    from stablemoe_ds.checkpoint.reader import Progress
    from stablemoe_ds.routing.fixed import TableRouting

    with engine_of(run) as engine:
        routes = TableRouting(table) if table else LEARNED
        for step, whole in enumerate(UPDATES):
            engine.set_learning_rate(run.optimizer.lr)
            sums = _accumulate(engine, whole, step, routes)
            engine.update()
            engine.teach_routers(sums)
        if frozen:
            routes = _frozen(engine, engine.model.vocab_size, table)
        progress = Progress(step=len(UPDATES), stage=2 if frozen else 1)
        save_here(engine, progress, table=routes.table)
        return _next_loss(engine, routes)


def move_here(run: RunConfig, source: Path) -> float:
    """Take a checkpoint, save it again, and say the loss of the third update."""
    from stablemoe_ds.routing.fixed import TableRouting

    with engine_of(run) as engine:
        checkpoint, table = _take(engine, source)
        save_here(engine, checkpoint.progress, table=table)
        return _next_loss(engine, TableRouting(table) if table else LEARNED)


def place_here(run: RunConfig, weights: dict[str, Tensor]) -> float:
    """Put weights in place without a checkpoint, and say the loss of the third update."""
    with engine_of(run) as engine:
        set_weights(engine, weights)
        return _next_loss(engine, LEARNED)


def loss_here(run: RunConfig, source: Path, start_table: Any = None) -> float:
    """Take a checkpoint and say the loss of the third update; a fixed router follows the table of its run's start.

    start_table: what some layers follow if the checkpoint has no table.
    """
    from stablemoe_ds.routing.fixed import TableRouting

    with engine_of(run) as engine:
        checkpoint, table = _take(engine, source)
        if run.moe.facts.fixed:
            return _next_loss(engine, _frozen(engine, checkpoint.vocab_size))
        table = table or start_table
        return _next_loss(engine, TableRouting(table) if table else LEARNED)


def _take(engine: Any, source: Path) -> tuple[Any, Any]:
    """A checkpoint, taken by the engine, and its table."""
    from stablemoe_ds.checkpoint.reader import Checkpoint
    from stablemoe_ds.checkpoint.restore import restore

    checkpoint = Checkpoint.open(source)
    restore(engine, checkpoint)
    return checkpoint, checkpoint.table()


def _frozen(engine: Any, vocab_size: int, followed: Any = None) -> Any:
    """What the engine's run follows if its routing is fixed now; every id occurs once."""
    from stablemoe_ds.training.sharded_weights import gathered

    counts = np.ones(vocab_size, dtype=np.int64)
    routers = engine.model.distilled_routers
    with gathered(routers):
        return RouteMaker(engine.run, routers, lambda: counts, "").frozen(followed)


def _next_loss(engine: Any, routes: Any) -> float:
    return float(_accumulate(engine, NEXT, len(UPDATES), routes).totals().mean_loss)


def _accumulate(engine: Any, whole: Batch, step: int, routes: Any = LEARNED) -> Any:
    from stablemoe_ds.training.routed_batch import RoutedBatch

    groups = engine.groups
    mine: Sequence[RoutedBatch] = [RoutedBatch(share(whole, groups))]
    return engine.accumulate(mine, routes, step)
