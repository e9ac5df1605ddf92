"""Every layout trains the same model: losses, norm and each tensor after 3 updates against the slow reference.

Two updates of stage 1 and one of stage 2, with padding, gradient clipping and decay. The reference is one process
in float64 that knows nothing of DeepSpeed, megatron-core or this package's arithmetic.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.compiler import needs_compiler
from tests.distributed.cases import SEQUENCES, assert_same, reference, run_of, start, table_of, three_updates
from tests.distributed.launch import run_distributed
from tests.distributed.worker import assemble, train
from tests.model.reference import SlowStep

pytestmark = pytest.mark.distributed
SWITCH = 2


def replicated(experts: int) -> dict[str, Any]:
    """So many of the four experts of a layer are on every rank."""
    return {"expert_placement": "load", "replicated_experts": experts}


LAYOUTS: list[tuple[int, str, dict[str, Any]]] = [
    (1, "paper", {"zero": 0}),
    (1, "paper", {"zero": 1}),
    (1, "modern", {"zero": 2}),
    (1, "modern", {"zero": 1, "micro": 4, "recompute": True}),
    (1, "paper, shared", {"zero": 1}),
    (1, "modern, gate of one", {"zero": 0}),
    (2, "paper", {"zero": 0}),
    (2, "modern", {"zero": 2}),
    (2, "paper", {"expert": 2, "zero": 0}),
    (2, "paper", {"expert": 2, "zero": 1, "micro": 2, "recompute": True}),
    (2, "modern", {"expert": 2, "zero": 2}),
    (2, "paper", {"tensor": 2, "zero": 2}),
    (2, "modern", {"tensor": 2, "zero": 0}),
    (2, "paper", {"tensor": 2, "expert": 2, "zero": 0}),
    (2, "modern", {"tensor": 2, "expert": 2, "zero": 1, "micro": 4, "recompute": True}),
    (2, "paper, learned gate", {"tensor": 2, "expert": 2, "zero": 2}),
    (2, "modern, gate of one", {"expert": 2, "zero": 2}),
    (2, "paper, shared", {"tensor": 2, "expert": 2, "zero": 1}),
    (2, "modern", {"expert": 2, "zero": 1, "micro": 2, "recompute": True, "dispatch_parts": 2}),
    (1, "modern, block 1 along a table", {"zero": 1}),
    (2, "modern, block 1 along a table", {"expert": 2, "zero": 1, "micro": 2, "dispatch_parts": 2}),
    (2, "modern, block 1 along a table", {"expert": 2, "zero": 2, "micro": 4, "recompute": True}),
    (2, "modern, block 1 along a table", {"tensor": 2, "expert": 2, "zero": 2}),
    (2, "modern, block 1 along a table", {"expert": 2, "zero": 3, "micro": 4, "recompute": True}),
    (2, "modern, block 1 along a table", {"tensor": 2, "zero": 3}),
    (2, "modern, block 1 along a table", {"sequence": 2, "zero": 2, "micro": 4, "recompute": True}),
    (4, "paper", {"expert": 4, "zero": 1}),
    (4, "modern", {"expert": 2, "zero": 2, "micro": 1}),
    (4, "modern", {"expert": 4, "zero": 0}),
    (4, "paper", {"tensor": 2, "expert": 2, "zero": 2}),
    (4, "modern", {"tensor": 2, "expert": 2, "zero": 1}),
    (4, "modern", {"tensor": 2, "expert": 4, "zero": 1, "micro": 2}),
    (1, "modern", {"zero": 3, "micro": 4, "recompute": True}),
    (2, "paper", {"zero": 3}),
    (2, "modern, gate of one", {"expert": 2, "zero": 3, "dispatch_parts": 2}),
    (2, "paper, learned gate", {"tensor": 2, "zero": 3}),
    (2, "paper, shared", {"expert": 2, "zero": 3, "micro": 2, "recompute": True}),
    (4, "modern", {"tensor": 2, "expert": 2, "zero": 3, "micro": 4, "recompute": True, "offload": "all"}),
    (2, "modern", {"sequence": 2, "expert": 2, "zero": 3, "dispatch_parts": 2, "offload": "optimizer"}),
    (4, "paper", {"expert": 2, "zero": 3}),
    (2, "paper", {"sequence": 2, "zero": 0, "micro": 4, "recompute": True, "dispatch_parts": 2}),
    (2, "modern", {"sequence": 2, "expert": 2, "zero": 1, "micro": 4, "recompute": True}),
    (4, "modern", {"sequence": 2, "expert": 4, "zero": 2, "micro": 2, "dispatch_parts": 2}),
    (4, "paper", {"sequence": 4, "expert": 2, "zero": 1}),
    (4, "modern", {"sequence": 2, "tensor": 2, "expert": 2, "zero": 2, "recompute": True}),
    (4, "paper, learned gate", {"sequence": 2, "expert": 2, "zero": 3}),
    (2, "paper", {"expert": 2, **replicated(1), "zero": 0}),
    (2, "paper, shared", {"expert": 2, **replicated(1), "zero": 3, "micro": 2, "recompute": True}),
    (4, "modern", {"tensor": 2, "expert": 2, **replicated(2), "zero": 2, "micro": 4, "dispatch_parts": 2}),
]

COMPILED = [
    pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.timeout(900), needs_compiler])
    for case in (
        (1, "paper", {"compile": True, "zero": 0}),
        (2, "modern", {"compile": True, "tensor": 2, "zero": 2}),
        (
            2,
            "modern",
            {"compile": True, "sequence": 2, "expert": 2, "micro": 4, "recompute": True, "dispatch_parts": 2},
        ),
    )
]


@cache
def reference_of(shape: str, accumulation: int) -> tuple[list[SlowStep], dict[str, torch.Tensor]]:
    return reference(shape, three_updates(accumulation), SWITCH)


def label(case: Any) -> str:
    return " ".join(f"{k}{v}" for k, v in case.items()) if isinstance(case, dict) else str(case)


@pytest.mark.parametrize(("world", "shape", "layout"), [*LAYOUTS, *COMPILED], ids=label)
def test_layout_trains_the_reference_model(world: int, shape: str, layout: dict[str, Any]) -> None:
    run = run_of(shape, **layout)
    micro = layout.get("micro")
    accumulation = SEQUENCES // (micro * world // (run.parallel.tensor * run.parallel.sequence)) if micro else 1
    patience = 900.0 if run.parallel.compile else 200.0
    updates = three_updates(accumulation)
    ranks = run_distributed(world, train, run, start(shape), updates, SWITCH, table_of(shape), timeout=patience)

    wanted, weights = reference_of(shape, accumulation)
    assert_same(ranks, wanted, weights)
    moved = [name for name in weights if not torch.equal(weights[name].float(), start(shape)[name])]
    assert len(moved) > 0.95 * len(weights), "a reference that stands still proves nothing"


@pytest.mark.parametrize("shape", ["paper", "modern"])
@pytest.mark.parametrize(
    ("world", "layout"), [(2, {"tensor": 2, "expert": 2, "zero": 3}), (4, {"expert": 4})], ids=label
)
def test_start_does_not_depend_on_the_layout(world: int, layout: dict[str, Any], shape: str) -> None:
    one, many = (
        assemble([rank.start for rank in run_distributed(n, train, run_of(shape, **way), None, [], 0)])
        for n, way in ((1, {}), (world, layout))
    )
    assert one.keys() == many.keys()
    assert [name for name in one if not torch.equal(one[name], many[name])] == []
