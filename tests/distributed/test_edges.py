"""Batches that leave experts, or whole ranks, without a token: no hang, no NaN, and the right numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from stablemoe_ds.data.batch import Batch
from tests.distributed.cases import SEQUENCES, assert_same, batch, reference, run_of, start
from tests.distributed.launch import run_distributed
from tests.distributed.test_parity import label
from tests.distributed.worker import assemble, train

pytestmark = pytest.mark.distributed


def one_id(seed: int) -> Batch:
    """Every token is the same id, so that in stage 2 one expert of one rank serves them all."""
    whole = batch(seed)
    return replace(whole, ids=torch.full_like(whole.ids, 5))


def padded_ranks(seed: int) -> Batch:
    """All but the first quarter of the sequences are padding: the batch of every data rank but the first."""
    whole = batch(seed)
    there = torch.arange(SEQUENCES)[:, None] < SEQUENCES // 4
    return replace(whole, real=whole.real & there, scored=whole.scored & there)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {"expert": 2, "zero": 0}),
        (2, {"expert": 2, "zero": 1}),
        (2, {"expert": 1, "zero": 2}),
        (4, {"expert": 2, "zero": 1}),
        (4, {"tensor": 2, "expert": 2, "zero": 2}),
        (2, {"expert": 2, "zero": 3}),
    ],
    ids=label,
)
@pytest.mark.parametrize(("make", "switch"), [(one_id, 0), (padded_ranks, 1)], ids=["one id", "padded ranks"])
def test_idle_experts_and_ranks(world: int, layout: dict[str, Any], make: Any, switch: int) -> None:
    updates = [[make(1)], [make(2)]]
    ranks = run_distributed(world, train, run_of("paper", **layout), start("paper"), updates, switch)
    assert_same(ranks, *reference("paper", updates, switch))
    if make is one_id:
        assert all(sorted(row)[:-1] == [0, 0, 0] for row in ranks[0].steps[0]["counts"])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_nothing_but_padding(zero: int) -> None:
    """Nothing to learn from: no gradient, no expert serves a token, weights only decay."""
    empty = batch(1)
    empty = replace(empty, real=torch.zeros_like(empty.real), scored=torch.zeros_like(empty.scored))
    run = run_of("modern", expert=2, zero=zero)
    ranks = run_distributed(2, train, run, start("modern"), [[empty], [empty]], 1)
    for step in ranks[0].steps:
        assert step["loss"] == step["balance"] == step["distill"] == step["norm"] == 0.0
        assert step["counts"] == [[0] * 4] * 2
    rest = (1 - run.optimizer.lr * run.optimizer.weight_decay) ** 2
    for name, w in assemble([rank.end for rank in ranks]).items():
        before = start("modern")[name]
        assert torch.allclose(w, before, atol=0) or torch.allclose(w, before * rest, rtol=1e-5, atol=0), name
