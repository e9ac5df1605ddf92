"""A whole update, counted: forward, backward, reduction, norm, clipping and AdamW, as a GPU would be waited for."""

from __future__ import annotations

import pytest

from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.training.routed_batch import RoutedBatch
from tests.benchmarks.updates import MICRO_BATCHES, engine_of, planned, waits_of

LAYOUTS = pytest.mark.parametrize(("dtype", "zero"), [("fp32", 0), ("fp32", 1), ("bf16", 1), ("bf16", 2)])


@LAYOUTS
def test_stage_2_waits_for_the_norm_alone(world_groups: Groups, dtype: str, zero: int) -> None:
    engine = engine_of(world_groups, dtype, zero)
    engine.freeze_distilled()
    steps = planned(engine)
    assert sum(waits_of(engine, lambda: next(steps)).values()) <= 1


@LAYOUTS
def test_stage_1_waits_beside_that_only_in_its_moe_layers(world_groups: Groups, dtype: str, zero: int) -> None:
    """The balance loss looks at each micro-batch beforehand, where the last MoE layer sends nothing."""
    engine = engine_of(world_groups, dtype, zero)
    waits = waits_of(engine, lambda: [RoutedBatch(micro) for micro in MICRO_BATCHES])
    layers = len(engine.model.moe_layers)
    assert sum(waits.values()) <= 1 + len(MICRO_BATCHES) * (layers + layers - 1)


def test_the_timer_of_deepspeed_would_be_noticed(world_groups: Groups) -> None:
    """It begins to wait with its third update."""
    engine = engine_of(world_groups, "fp32", 1, deepspeed={"timers": {"throughput": {"enabled": True}}})
    engine.deepspeed.tput_timer.global_step_count = 2
    waits = waits_of(engine, lambda: [RoutedBatch(micro) for micro in MICRO_BATCHES])
    assert waits["synchronize"] == 2 * len(MICRO_BATCHES)
