"""A setting that a run calls idle changes neither weights, losses nor the table; one that it looks at does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from stablemoe_ds.config.idle_settings import idle_keys
from stablemoe_ds.config.routers import ROUTERS
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.routing.source import RouteMaker
from stablemoe_ds.tables.builders import random_table
from stablemoe_ds.tables.table import RoutingTable
from tests.tiny import VOCAB, tiny_run

OTHER: dict[str, Any] = {
    "placement": "replace",
    "experts": 8,
    "sublayers": 2,
    "ffn_hidden_size": 48,
    "top_k": 2,
    "shared_experts": 1,
    "capacity_factor": 0.3,
    "equal_experts": True,
    "balance_weight": 0.7,
    "balance_over": "micro_batch",
    "router_input": "raw",
    "centroid_gain": 0.9,
    "distill_weight": 0.7,
    "distilled.kind": "cnn",
    "distilled.dim": 7,
    "distilled.layers": 3,
    "distilled.bigram_start": "itself",
    "distilled.lr_scale": 3.0,
    "hash_table": "even",
    "table_load": 2.5,
    "bias_step": 0.5,
}
"""A value of each setting that is not its default."""
REFUSED = {"gate", "table"}
"""Where they are idle, they are refused."""
CASES: dict[str, dict[str, Any]] = {
    **{name: {"router": name} for name in ROUTERS},
    "dense": {"router": "dense", "layers": []},
    "table": {"router": "table", "table": "random"},
    "hash, sigmoid": {"router": "hash", "gate": "sigmoid"},
    **{f"{kind} routers": {"distilled": {"kind": kind}} for kind in ("bigram", "cnn", "transformer")},
}
COUNTS = np.arange(VOCAB)[::-1] ** 2
Trace = Callable[[dict[str, Any]], dict[str, Any]]


def changed(moe: dict[str, Any], *names: str) -> dict[str, Any]:
    """The section with another value of these settings."""
    moe = {**moe, "distilled": dict(moe.get("distilled", {}))}
    for name in names:
        section, _, last = name.rpartition(".")
        (moe[section] if section else moe)[last] = OTHER[name]
    return moe


@pytest.fixture
def trace(build: Callable[..., Any]) -> Trace:
    """What a fresh model is and does: its weights, the losses of one batch, and what fixes its routes."""
    ids = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(2))
    every = torch.ones(2, 16, dtype=torch.bool)
    given = RoutingTable(random_table(VOCAB, 4, 1, 2, seed=3), 4, (2, 3))

    def run(moe: dict[str, Any]) -> dict[str, Any]:
        model = build(moe=moe)
        maker = RouteMaker(
            tiny_run(moe=moe, stages={"at_step": 2}), model.distilled_routers, lambda: COUNTS, "", build=lambda: given
        )
        fixed = maker.frozen() if maker.can_freeze else None
        follows = fixed(ids[:, :-1]) if fixed is not None and ROUTERS[moe.get("router", "stablemoe")].fixed else {}
        with torch.no_grad():
            out = model(Batch(ids[:, :-1], ids[:, 1:], every, every), follows)
        losses = {name: float(value) for report in out.layers for name, value in report.loss_sums.items()}
        weights = {name: value.tolist() for name, value in model.named_parameters()}
        table = fixed.table.sha256 if fixed is not None and fixed.table is not None else None
        return {"weights": weights, "loss": float(out.loss_sum), "losses": losses, "table": table}

    return run


@pytest.mark.parametrize("moe", CASES.values(), ids=CASES)
def test_what_is_idle_changes_nothing(trace: Trace, moe: dict[str, Any]) -> None:
    idle = {key.removeprefix("moe.") for key in idle_keys(tiny_run(moe=moe).moe)} - REFUSED
    if moe.get("router", "").startswith("dense_"):
        idle -= {"shared_experts"}  # refused there
    assert idle
    assert trace(changed(moe, *idle)) == trace(moe)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("stablemoe", "centroid_gain"),
        ("hash, sigmoid", "centroid_gain"),
        ("stablemoe", "router_input"),
        ("stablemoe", "distilled.dim"),
        ("bigram routers", "distilled.bigram_start"),
        ("transformer routers", "distilled.layers"),
        ("hash", "hash_table"),
        ("stablemoe_balanced", "table_load"),
        ("dense_wider", "experts"),
        ("base", "capacity_factor"),
        ("switch", "top_k"),
    ],
)
def test_what_is_looked_at_changes_something(trace: Trace, case: str, name: str) -> None:
    assert f"moe.{name}" not in idle_keys(tiny_run(moe=CASES[case]).moe)
    assert trace(changed(CASES[case], name)) != trace(CASES[case])
