"""A checkpoint belongs to no layout: it moves between processes, parallel degrees and ZeRO stages unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_distributed
from tests.training.runs import (
    TinyData,
    checkpoint_of,
    differing,
    history,
    resave_here,
    restarted,
    small_run,
    tensors_of,
    train_run,
)

Layout = tuple[int, dict[str, int]]
ALONE_0: Layout = (1, {"zero_stage": 0})
ALONE_1: Layout = (1, {"zero_stage": 1})
EXPERT: Layout = (2, {"expert": 2, "zero_stage": 2})
TENSOR: Layout = (2, {"tensor": 2, "zero_stage": 1})
TENSOR_EXPERT: Layout = (2, {"tensor": 2, "expert": 2, "zero_stage": 2})

MOVES = {
    "expert 2, ZeRO 2, to one process, ZeRO 0": (EXPERT, ALONE_0),
    "one process, ZeRO 1, to expert 2, ZeRO 2": (ALONE_1, EXPERT),
    "tensor 2 to one process": (TENSOR, ALONE_1),
    "one process to tensor 2 x expert 2": (ALONE_0, TENSOR_EXPERT),
}


@pytest.mark.distributed
@pytest.mark.parametrize("move", MOVES)
def test_moves_without_a_change(move: str, data: TinyData, tmp_path: Path) -> None:
    (ranks, parallel), (new_ranks, new_parallel) = MOVES[move]
    more: dict[str, Any] = {"moe": {"shared_experts": 1}, "checkpoint": {"every": 4, "keep": 9}}
    old = small_run(data, tmp_path / "old", parallel=parallel, **more)
    train_run(old, ranks)

    again = small_run(data, tmp_path / "again", parallel=new_parallel, **more)
    run_distributed(new_ranks, resave_here, again, checkpoint_of(old, 8))
    saved = tensors_of(checkpoint_of(old, 8))
    assert all(value.any() for name, value in saved.items() if name.endswith("w1/exp_avg")), "moments are zero"
    assert differing(tensors_of(checkpoint_of(again, 8)), saved) == []

    moved = restarted(small_run(data, tmp_path / "old", parallel=new_parallel, **more), tmp_path / "moved", 4)
    train_run(moved, new_ranks)
    losses, expected = ([line["loss"] for line in history(run, "train")] for run in (moved, old))
    assert losses[:4] == expected[:4], "the history before the move stays"
    assert losses[4:7] == pytest.approx(expected[4:7], abs=1e-5)
