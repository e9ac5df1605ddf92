"""What must not change with accumulation, recomputation or precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.routing.source import LEARNED
from stablemoe_ds.training.routed_batch import RoutedBatch
from tests.distributed.cases import SEQUENCES, batch, run_of, start, three_updates
from tests.distributed.launch import run_distributed
from tests.distributed.worker import Outcome, assemble, engine_of, set_weights, share, train

pytestmark = pytest.mark.distributed


def norms(updates: Any, moe: dict[str, Any], **layout: Any) -> list[float]:
    run = run_of("paper", moe, expert=2, **layout)
    tokens = run.schedule.tokens_per_step * len(updates[0])
    run = run.model_copy(update={"schedule": run.schedule.model_copy(update={"tokens_per_step": tokens})})
    return [step["norm"] for step in run_distributed(2, train, run, start("paper"), updates, 99)[0].steps]


@pytest.mark.parametrize("recompute", [False, True])
def test_auxiliary_gradient_depends_on_neither_accumulation_nor_recomputation(recompute: bool) -> None:
    """The same micro-batch twice is the same update as once."""
    weights = {"balance_weight": 3.0, "distill_weight": 1.0}
    plain = norms([[batch(1)], [batch(2)]], weights)
    twice = norms([[batch(1)] * 2, [batch(2)] * 2], weights, micro=SEQUENCES // 2, recompute=recompute)
    assert twice == pytest.approx(plain, rel=1e-5)
    without = norms([[batch(1)]], {"balance_weight": 0.0, "distill_weight": 0.0})
    assert plain[0] > 1.2 * without[0], "the auxiliary losses must matter here"


def balanced(router: str, micro: int, ranks: int, **moe: Any) -> dict[str, float]:
    """Gradient norm and balance loss of one update of stage 1, its sequences cut into micro-batches of a rank."""
    section = {"router": router, "balance_weight": 3.0, **moe}
    run = run_of("paper", section, micro=micro)
    pieces = SEQUENCES // (micro * ranks)
    cut = [batch(1).map(lambda whole, i=i: whole.chunk(pieces)[i]) for i in range(pieces)]
    step = run_distributed(ranks, train, run, start("paper"), [cut], 99)[0].steps[0]
    return {"norm": step["norm"], "balance": step["balance"]}


@pytest.mark.parametrize("router", ["stablemoe", "switch"])
def test_the_balance_loss_counts_over_the_update_whatever_the_layout(router: str) -> None:
    whole = balanced(router, SEQUENCES, 1)
    for micro, ranks in ((1, 1), (2, 1), (1, 2)):
        assert balanced(router, micro, ranks) == pytest.approx(whole, rel=1e-5)
    alone = balanced(router, 1, 1, balance_over="micro_batch")
    assert alone["norm"] != pytest.approx(whole["norm"], rel=1e-3), "the choice matters here"


@pytest.mark.parametrize(("shape", "cf"), [("paper", None), ("modern", 0.75)])
def test_recomputation_changes_no_bit(shape: str, cf: float | None) -> None:
    """Nor the choice of who exceeds an expert's capacity: two micro-batches an update, two updates of stage 1."""
    ends, drops = [], []
    for recompute in (False, True):
        run = run_of(shape, {"capacity_factor": cf}, expert=2, micro=2, recompute=recompute)
        ranks = run_distributed(2, train, run, start(shape), three_updates(2), 2)
        ends.append(assemble([rank.end for rank in ranks]))
        drops.append([step["dropped"] for step in ranks[0].steps])
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []
    assert drops[0] == drops[1]
    assert all(dropped > 0 for dropped in drops[0]) is (cf is not None)


def test_drops_are_counted_over_all_ranks() -> None:
    """An expert of a group takes ceil(cf * routed / N) and drops the rest; here the group is the world."""
    run = run_of("paper", {"capacity_factor": 1.0}, expert=2)
    for step in run_distributed(2, train, run, start("paper"), three_updates(1), 2)[0].steps:
        wanted = sum(max(0, count + -sum(row) // 4) for row in step["counts"] for count in row)
        assert step["dropped"] == wanted > 0


BF16: list[tuple[int, dict[str, Any]]] = [
    (2, {"expert": 2, "zero": 1}),
    (2, {"expert": 2, "zero": 2}),
    (2, {"expert": 2, "zero": 3}),
    (2, {"zero": 3, "offload": "all"}),
    (4, {"tensor": 2, "sequence": 2, "expert": 2, "zero": 1, "micro": 4, "recompute": True, "dispatch_parts": 2}),
]


@pytest.mark.parametrize(("world", "layout"), BF16, ids=str)
def test_bf16_is_close_to_fp32(world: int, layout: dict[str, Any]) -> None:
    def run(dtype: str) -> Outcome:
        updates = three_updates(SEQUENCES // layout.get("micro", SEQUENCES))
        return run_distributed(world, train, run_of("modern", None, dtype, **layout), start("modern"), updates, 2)[0]

    full, half = run("fp32"), run("bf16")
    for got, wanted in zip(half.steps, full.steps, strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-2)
        assert got["norm"] == pytest.approx(wanted["norm"], rel=5e-2)
    # The word router and what it imitates are fp32: only tokens whose learned choice bf16 flips make a difference.
    assert half.steps[0]["distill"] == pytest.approx(full.steps[0]["distill"], rel=1e-2)
    for name, part in half.start.items():
        assert torch.equal(part.tensor, full.start[name].tensor), "fp32 masters keep every bit of the start"


def stage_1_routes(zero: int) -> list[torch.Tensor]:
    """Experts [L, T, K] of a rank's tokens in bf16, before and after three updates of stage 1."""
    run = run_of("modern", None, "bf16", expert=2, zero=zero)
    return run_distributed(2, routes_here, run, start("modern"), three_updates(1))[0]


def routes_here(run: RunConfig, weights: dict[str, torch.Tensor], updates: list[list[Batch]]) -> list[torch.Tensor]:
    """What a rank does for it."""
    with engine_of(run) as engine:
        set_weights(engine, weights)
        routes = [experts_of(engine)]
        for step, (whole,) in enumerate(updates):
            engine.set_learning_rate(run.optimizer.lr)
            engine.accumulate([RoutedBatch(share(whole, engine.groups))], LEARNED, step)
            engine.update()
        return [*routes, experts_of(engine)]


@torch.no_grad()
def experts_of(engine: Any) -> torch.Tensor:
    layers = engine.model.eval()(share(batch(9), engine.groups)).layers
    engine.model.train()
    return torch.stack([layer.expert_TK for layer in layers])


def test_zero_3_in_bf16_routes_as_zero_1_does() -> None:
    """With equal weights every token goes to the same experts: those of routers are fp32 under both stages.

    After three updates, rounding of sums moves at most one choice in fifty.
    """
    (before, after), (before_3, after_3) = stage_1_routes(1), stage_1_routes(3)
    assert torch.equal(before_3, before)
    assert (after != before).float().mean() > 0.05, "the updates teach the routers something"
    assert (after_3 != after).float().mean() <= 0.02
