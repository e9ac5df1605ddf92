"""Planning ahead: the same plans as made in the step, the same training, and a named error where ranks disagree."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.errors import UserError
from tests.distributed.cases import batch, run_of
from tests.distributed.launch import run_distributed
from tests.distributed.worker import engine_of, share
from tests.tables.texts import split_at_random
from tests.tiny import VOCAB

pytestmark = pytest.mark.distributed
LAYOUTS = [
    (1, {"expert": 1}),
    (2, {"expert": 2}),
    (2, {"tensor": 2, "expert": 2}),
    (4, {"expert": 2, "dispatch_parts": 3}),
    (4, {"tensor": 2, "expert": 4}),
    (4, {"sequence": 2, "expert": 4}),
]
UPDATES = 5


def updates(groups: Any) -> list[list[Batch]]:
    """Two micro-batches an update; more updates than are planned ahead."""
    return [[share(batch(10 * update + micro), groups) for micro in range(2)] for update in range(UPDATES)]


def facts(plan: Any) -> dict[str, Any]:
    return vars(plan) | {"offsets": list(plan.offsets.sizes), "ends": plan.offsets.ends_E}


def plans_beside_those_of_the_step(run: RunConfig) -> list[tuple[Any, Any]]:
    from stablemoe_ds.moe.plan import plan_dispatch
    from stablemoe_ds.moe.tensor_split import split_tokens
    from stablemoe_ds.routing.fixed import freeze
    from stablemoe_ds.training.planner import Planner

    pairs = []
    with engine_of(run) as engine:
        groups, layers = engine.groups, engine.model.moe_layers
        table = freeze(engine.model.distilled_routers, run.moe.top_k, (1, 2)).table
        planner = Planner(iter(updates(groups)), table, groups, run.parallel)
        for step in planner:
            for micro in step:
                assert list(micro.known) == list(micro.plans) == [layer.block for layer in layers]
                for layer in layers:
                    plan = micro.plans[layer.block]
                    expert_TK = split_tokens(micro.known[layer.block], groups.placement.tensor_group)
                    own = plan_dispatch(expert_TK, run.moe.experts, layer.expert_group, layer.parts)
                    pairs += [(facts(part), facts(other)) for part, other in zip(plan, own, strict=True)]
        planner.close()
    return pairs


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=str)
def test_plans_are_those_a_step_would_make(world: int, layout: dict[str, Any]) -> None:
    for pairs in run_distributed(world, plans_beside_those_of_the_step, run_of("modern", zero=1, micro=None, **layout)):
        assert len(pairs) == UPDATES * 2 * 2 * layout.get("dispatch_parts", 1)
        for planned, own in pairs:
            for name, value in own.items():
                same = torch.equal(planned[name], value) if isinstance(value, torch.Tensor) else planned[name] == value
                assert same, name


def losses(run: RunConfig, planned: bool, splits: bool) -> list[float]:
    from stablemoe_ds.routing.fixed import TableRouting, freeze
    from stablemoe_ds.training.planner import Planner
    from stablemoe_ds.training.routed_batch import RoutedBatch

    found = []
    with engine_of(run) as engine:
        groups = engine.groups
        engine.freeze_distilled()
        routing = freeze(engine.model.distilled_routers, run.moe.top_k, (1, 2))
        if splits:
            routing = TableRouting(split_at_random(routing.table, list(range(0, VOCAB, 2)), 2))
        steps = updates(groups)
        planner = Planner(iter(steps), routing.table, groups, run.parallel) if planned else None
        for step in planner or ([RoutedBatch(micro) for micro in step] for step in steps):
            engine.set_learning_rate(run.optimizer.lr)
            sums = engine.accumulate(step, routing, 0).totals()
            engine.update()
            found += [sums.loss, engine.gradient_norm()]
        if planner:
            planner.close()
    return found


@pytest.mark.parametrize(
    ("layout", "splits"),
    [({"zero": 1, "micro": 2}, False), ({"zero": 2, "micro": 2}, False), ({"zero": 1, "sequence": 2}, True)],
    ids=str,
)
def test_planned_training_is_the_same_to_the_bit(layout: dict[str, Any], splits: bool) -> None:
    run = run_of("paper", expert=2, **layout)
    assert run_distributed(2, losses, run, True, splits) == run_distributed(2, losses, run, False, splits)


def disagree(run: RunConfig, how: str) -> tuple[str, float]:
    """What the planner says, and after how many seconds, when the last rank differs from its neighbour."""
    from stablemoe_ds.tables.table import RoutingTable
    from stablemoe_ds.training.planner import Planner

    with engine_of(run) as engine:
        groups = engine.groups
        odd = groups.world.rank == groups.world.size - 1
        expert_LVK = np.arange(2 * 64, dtype=np.int32).reshape(2, 64, 1) % 4
        if how == "table" and odd:
            expert_LVK[1, 7] = (expert_LVK[1, 7] + 1) % 4
        table = RoutingTable(expert_LVK, 4, (1, 2))
        if how == "split":
            table = split_at_random(table, [3, 4 + odd], 2)
        steps = updates(groups)
        if how == "batch" and odd:
            steps = updates(groups)[1:]
        began = time.perf_counter()
        planner = Planner(iter(steps), table, groups, run.parallel)
        try:
            next(iter(planner))
        except UserError as error:
            planner.close()
            return str(error), time.perf_counter() - began
        raise AssertionError("nobody noticed")


@pytest.mark.parametrize(
    ("world", "how", "layout", "said"),
    [
        (2, "table", {"expert": 2}, "ranks 0 and 1 route the MoE layer at block 2 by different tables"),
        (2, "split", {"expert": 2}, "ranks 0 and 1 route the MoE layer at block 1 by different tables"),
        (2, "batch", {"tensor": 2, "expert": 2}, "ranks 0 and 1 should have the same batch and have not"),
        (4, "batch", {"tensor": 2, "expert": 4}, "ranks 2 and 3 should have the same batch and have not"),
    ],
)
def test_every_rank_says_what_differs(world: int, how: str, layout: dict[str, Any], said: str) -> None:
    run = run_of("paper", moe={"experts": 4}, zero=1, **layout)
    for message, seconds in run_distributed(world, disagree, run, how):
        assert said in message
        assert "rows to send" in message
        assert seconds < 30  # a hang would last the group's timeout, a minute


def stop_early(run: RunConfig) -> tuple[bool, list[int], list[int]]:
    """Ranks that stop after the same update, however far each had planned.

    A number of each update that was given or is left, and of all updates.
    """
    from stablemoe_ds.routing.fixed import freeze
    from stablemoe_ds.training.planner import Planner

    with engine_of(run) as engine:
        groups = engine.groups
        table = freeze(engine.model.distilled_routers, run.moe.top_k, (1, 2)).table
        source = iter(updates(groups))
        planner = Planner(source, table, groups, run.parallel)
        given = [routed.batch for routed in next(iter(planner))]
        if groups.world.rank == 1:
            time.sleep(0.5)
        left = planner.close()
        found, every = (given, *left, *source), updates(groups)
        return planner._thread.is_alive(), *([int(b[1].ids.sum()) for b in way] for way in (found, every))


def test_closing_leaves_no_thread_behind_and_loses_no_update() -> None:
    ended = run_distributed(2, stop_early, run_of("paper", expert=2, zero=1))
    for alive, numbers, every in ended:
        assert not alive
        assert numbers == every
