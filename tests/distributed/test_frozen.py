"""After the switch nothing moves the distilled router, and stage 2 routes alike wherever it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.cases import LENGTH, batch, run_of, start
from tests.distributed.launch import run_distributed
from tests.distributed.worker import Part, train

pytestmark = pytest.mark.distributed
KINDS = ("word", "bigram", "cnn", "transformer")


def tensors(held: dict[str, Part], distilled: bool) -> dict[str, torch.Tensor]:
    return {name: part.tensor for name, part in held.items() if (".distilled." in name) is distilled}


@pytest.mark.parametrize(
    ("zero", "dtype", "kind"),
    [(0, "fp32", "word"), (1, "fp32", "word"), (2, "fp32", "word"), (1, "bf16", "word"), (2, "bf16", "word"),
     (0, "fp32", "cnn"), (1, "bf16", "transformer"), (2, "fp32", "bigram"),
     (3, "fp32", "word"), (3, "bf16", "transformer")],
)  # fmt: skip
def test_frozen_router_never_moves_again(zero: int, dtype: str, kind: str) -> None:
    """Adam has momentum for it from two updates of stage 1; weight decay is on. Five updates of stage 2 follow."""
    run = run_of("paper", {"distilled": {"kind": kind}}, dtype, expert=2, zero=zero)
    updates = [[batch(1)], [batch(2)], *[[batch(3)]] * 5]
    for rank in run_distributed(2, train, run, start("paper", kind), updates, 2):
        learned = tensors(rank.frozen[0], True)
        assert any(not torch.equal(w, start("paper", kind)[name]) for name, w in learned.items()), "stage 1 taught it"
        assert len(rank.frozen) == 6
        for later in rank.frozen[1:]:
            now = tensors(later, True)
            assert [name for name, w in learned.items() if not torch.equal(w, now[name])] == []
        others, at_end = tensors(rank.frozen[0], False), tensors(rank.frozen[-1], False)
        moved = [name for name, w in others.items() if not torch.equal(w, at_end[name])]
        assert len(moved) > 0.9 * len(others)
        assert all(torch.equal(routes, rank.routes[0]) for routes in rank.routes)
        assert len(set(rank.tables)) == (1 if kind == "word" else 0)


def routes_of(kind: str, world: int, dtype: str, **layout: Any) -> tuple[torch.Tensor, set[str]]:
    """Experts [L, sequence, position, K] of one batch in stage 2, put together from all ranks and micro-batches."""
    run = run_of("modern", {"distilled": {"kind": kind}}, dtype, **layout)
    whole = batch(4)
    count = 8 // (layout["micro"] * world) if "micro" in layout else 1
    micro_batches = [whole.map(lambda field, m=m: field.chunk(count)[m]) for m in range(count)]
    ranks = run_distributed(world, train, run, start("modern", kind), [micro_batches], 0)
    pieces = [ranks[r].routes[m] for m in range(count) for r in range(world)]
    by_sequence = [piece.unflatten(1, (LENGTH, -1)).transpose(1, 2) for piece in pieces]
    return torch.cat(by_sequence, 1), {sha for rank in ranks for sha in rank.tables}


@pytest.mark.parametrize("kind", KINDS)
def test_routes_of_stage_2_are_the_same_everywhere(kind: str) -> None:
    alone, table = routes_of(kind, 1, "fp32")
    assert alone.unique().numel() > 2
    for world, dtype, layout in (
        (1, "bf16", {"micro": 1}),
        (2, "fp32", {"expert": 2, "micro": 2}),
        (2, "bf16", {"zero": 3}),
    ):
        routes, other_table = routes_of(kind, world, dtype, **layout)
        assert torch.equal(routes, alone), (world, dtype, layout)
        assert other_table == table
