"""A whole update, counted: forward, backward, reduction, norm, clipping and AdamW, as a GPU would be waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.counting import counted
from stablemoe_ds.config.batch import batch_plan
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.fixed import freeze
from stablemoe_ds.routing.source import LEARNED
from stablemoe_ds.training.engine import Engine
from stablemoe_ds.training.planner import Planner
from stablemoe_ds.training.routed_batch import RoutedBatch
from tests.distributed.cases import SEQUENCES, batch, run_of

MICRO_BATCHES = [batch(seed, SEQUENCES // 2) for seed in (1, 2)]
LAYOUTS = pytest.mark.parametrize(("dtype", "zero"), [("fp32", 0), ("fp32", 1), ("bf16", 1), ("bf16", 2)])


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


@LAYOUTS
def test_stage_2_waits_for_the_norm_alone(world_groups: Groups, dtype: str, zero: int) -> None:
    engine = engine_of(world_groups, dtype, zero)
    engine.freeze_distilled()
    steps = planned(engine)
    assert sum(waits_of(engine, lambda: next(steps)).values()) <= 1


@LAYOUTS
def test_stage_1_waits_beside_that_only_in_its_moe_layers(world_groups: Groups, dtype: str, zero: int) -> None:
    engine = engine_of(world_groups, dtype, zero)
    waits = waits_of(engine, lambda: [RoutedBatch(micro) for micro in MICRO_BATCHES])
    assert sum(waits.values()) <= 1 + len(MICRO_BATCHES) * len(engine.model.moe_layers)


def test_the_timer_of_deepspeed_would_be_noticed(world_groups: Groups) -> None:
    """It begins to wait with its third update."""
    engine = engine_of(world_groups, "fp32", 1, deepspeed={"timers": {"throughput": {"enabled": True}}})
    engine.deepspeed.tput_timer.global_step_count = 2
    waits = waits_of(engine, lambda: [RoutedBatch(micro) for micro in MICRO_BATCHES])
    assert waits["synchronize"] == 2 * len(MICRO_BATCHES)
