"""Layouts on a GPU against the slow reference: ZeRO 3 and offload alone, the others as two ranks of one GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.distributed.groups import Groups
from tests.distributed.cases import SEQUENCES, assert_same, reference, run_of, start, table_of, three_updates
from tests.distributed.test_parity import SWITCH, label, replicated
from tests.distributed.worker import train
from tests.evaluation.test_generate import PROMPTS
from tests.export.small_checkpoints import save_model
from tests.gpu.one_gpu import run_on_one_gpu
from tests.tiny import VOCAB, tiny_run
from tests.training.runs import TinyData, train_here
from tests.training.test_expert_order import assert_same_training
from tests.training.test_split_table import split_run

LAYOUTS: list[tuple[int, str, dict[str, Any]]] = [
    (1, "modern", {"zero": 3, "micro": 4, "recompute": True}),
    (1, "paper", {"zero": 3, "micro": 4, "offload": "optimizer"}),
    (1, "modern", {"zero": 3, "offload": "all"}),
    (1, "modern, block 1 along a table", {"zero": 1}),
    (2, "paper", {"expert": 2, "zero": 1, "micro": 2, "recompute": True}),
    (2, "modern", {"expert": 2, "zero": 2, "dispatch_parts": 2}),
    (2, "paper, shared", {"expert": 2, **replicated(1), "zero": 2}),
    (2, "modern", {"sequence": 2, "expert": 2, "zero": 1}),
    (2, "modern", {"tensor": 2, "expert": 2, "zero": 1}),
    (2, "modern, block 1 along a table", {"expert": 2, "zero": 3}),
]


@pytest.mark.parametrize(("world", "shape", "layout"), LAYOUTS, ids=label)
def test_layout_trains_the_reference_model(world: int, shape: str, layout: dict[str, Any]) -> None:
    run = run_of(shape, **layout)
    accumulation = SEQUENCES // (run.parallel.micro_batch * world) if run.parallel.micro_batch else 1
    updates = three_updates(accumulation)
    ranks = run_on_one_gpu(world, train, run, start(shape), updates, SWITCH, table_of(shape))
    assert_same(ranks, *reference(shape, updates, SWITCH), error=1e-4)


def test_two_ranks_train_along_a_split_table_what_one_does(data: TinyData, tmp_path: Path) -> None:
    one = split_run(data, tmp_path / "one")
    two = split_run(data, tmp_path / "two", parallel={"expert": 2, "expert_placement": "load"})
    for ranks, run in enumerate((one, two), 1):
        run_on_one_gpu(ranks, train_here, run)
    assert_same_training(one, two)


def test_experts_that_are_fetched_compute_what_all_in_memory_do(groups: Groups, tmp_path: Path) -> None:
    from stablemoe_ds.evaluation.generate import generate
    from stablemoe_ds.evaluation.trained_model import TrainedModel

    save_model(tiny_run(moe={"experts": 8}), VOCAB, 2, groups.placement, tmp_path)
    whole, part = (TrainedModel(Checkpoint.open(tmp_path), groups.world, fraction) for fraction in (1.0, 0.25))
    ids, same_ids = (generate(one.model, PROMPTS, one.routes, max_new_tokens=8) for one in (whole, part))
    assert ids == same_ids
    assert part.residency is not None
    assert part.residency.traffic.fetched > 0
