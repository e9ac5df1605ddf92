"""Updates of a tiny engine, and what of them a GPU would be, or is, waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.counting import counted
from stablemoe_ds.config.batch_plan import batch_plan
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.fixed import freeze
from stablemoe_ds.routing.source import LEARNED
from stablemoe_ds.training.engine import Engine
from stablemoe_ds.training.planner import Planner
from stablemoe_ds.training.routed_batch import RoutedBatch
from tests.distributed.cases import SEQUENCES, batch, run_of

MICRO_BATCHES = [batch(seed, SEQUENCES // 2) for seed in (1, 2)]


def engine_of(groups: Groups, dtype: str, zero: int, **more: Any) -> Engine:
    run = run_of("modern", dtype=dtype, zero=zero, micro=SEQUENCES // 2)
    run = run.model_copy(update=more)
    return Engine(run, batch_plan(run, 1), groups, StableMoEGPT(run, run.model.vocab_size or 0, groups.placement))


def planned(engine: Engine) -> Iterator[list[RoutedBatch]]:
    """Two updates of stage 2, as the planner hands them over."""
    moe = engine.run.moe
    table = freeze(engine.model.distilled_routers, moe.top_k, tuple(moe.layers)).table
    assert table is not None
    planner = Planner(iter([MICRO_BATCHES] * 2), table, engine.groups, engine.run.parallel)
    yield from planner
    planner.close()


def waits_of(engine: Engine, update: Callable[[], list[RoutedBatch]]) -> dict[str, int]:
    """Of the second update; what the first waits for, it waits for once."""
    for _ in range(2):
        routed = update()
        with counted(engine.groups.world.device) as counts:
            engine.set_learning_rate(1e-3)
            figures = engine.accumulate(routed, LEARNED, 0)
            engine.update()
            engine.teach_routers(figures)
    return dict(counts.host_waits)
