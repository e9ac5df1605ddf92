"""A checkpoint belongs to no layout: it moves between processes, parallel degrees, ZeRO stages and precisions.

The loss after a move is held against that of the layout that saved, where both compute alike. A step in bf16 is
another function of the same master weights than one in fp32, and one of 2 tensor ranks, which rounds partial sums to
8 bits, than one of a single rank. There it is held against the new layout's own loss, with the saved weights put in
place by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.moves import move_here, place_here, train_here
from tests.distributed.cases import run_of
from tests.distributed.launch import run_distributed
from tests.training.runs import (
    TinyData,
    checkpoint_of,
    differing,
    history,
    restarted,
    small_run,
    tensors_of,
    train_run,
)

Layout = tuple[int, dict[str, Any]]
REPLICATED = {"expert_placement": "load", "replicated_experts": 1}
LAYOUTS: dict[str, Layout] = {
    "1 process, ZeRO 0": (1, {"zero": 0}),
    "1 process, ZeRO 1": (1, {"zero": 1}),
    "1 process, ZeRO 2": (1, {"zero": 2}),
    "1 process, bf16": (1, {"zero": 1, "dtype": "bf16"}),
    "data 2, ZeRO 0": (2, {"zero": 0}),
    "data 2, ZeRO 2": (2, {"zero": 2}),
    "data 2, bf16, ZeRO 2": (2, {"zero": 2, "dtype": "bf16"}),
    "expert 2, bf16, ZeRO 1": (2, {"expert": 2, "zero": 1, "dtype": "bf16"}),
    "tensor 2, bf16, ZeRO 2": (2, {"tensor": 2, "zero": 2, "dtype": "bf16"}),
    "expert 2, ZeRO 1": (2, {"expert": 2, "zero": 1}),
    "tensor 2, ZeRO 1": (2, {"tensor": 2, "zero": 1}),
    "tensor 2, expert 2, ZeRO 2": (2, {"tensor": 2, "expert": 2, "zero": 2}),
    "data 4, expert 2, ZeRO 2": (4, {"expert": 2, "zero": 2}),
    "data 4, expert 4, ZeRO 0": (4, {"expert": 4, "zero": 0}),
    "data 2, ZeRO 3": (2, {"zero": 3}),
    "expert 2, ZeRO 3": (2, {"expert": 2, "zero": 3}),
    "data 4, expert 2, ZeRO 3": (4, {"expert": 2, "zero": 3}),
    "expert 2, bf16, ZeRO 3": (2, {"expert": 2, "zero": 3, "dtype": "bf16"}),
    "expert 2, bf16, ZeRO 3, offload": (2, {"expert": 2, "zero": 3, "dtype": "bf16", "offload": "all"}),
    "tensor 2, expert 2, ZeRO 3": (2, {"tensor": 2, "expert": 2, "zero": 3}),
    "sequence 2, expert 2, ZeRO 2": (2, {"sequence": 2, "expert": 2, "zero": 2}),
    "data 2, tensor 2, expert 4, ZeRO 1": (4, {"tensor": 2, "expert": 4, "zero": 1}),
    "expert 2, replicated, bf16, ZeRO 1": (2, {"expert": 2, **REPLICATED, "zero": 1, "dtype": "bf16"}),
    "expert 2, replicated, ZeRO 3": (2, {"expert": 2, **REPLICATED, "zero": 3}),
    "data 4, expert 4, replicated, ZeRO 2": (4, {"expert": 4, **REPLICATED, "zero": 2}),
}
PARAMETERS, BUFFER = "stablemoe", "topk"
"""A router that is all parameters, and one that keeps a buffer beside them."""
SHAPE = {PARAMETERS: "modern", BUFFER: "paper, shared"}
MOVES = [
    ("1 process, ZeRO 0", "data 4, expert 2, ZeRO 2"),
    ("1 process, ZeRO 0", "tensor 2, expert 2, ZeRO 2"),
    ("1 process, ZeRO 1", "1 process, ZeRO 2"),
    ("1 process, ZeRO 2", "data 2, ZeRO 0"),
    ("data 2, ZeRO 2", "expert 2, ZeRO 1"),
    ("data 2, ZeRO 2", "1 process, ZeRO 0"),
    ("expert 2, ZeRO 1", "tensor 2, ZeRO 1"),
    ("expert 2, ZeRO 1", "data 4, expert 4, ZeRO 0"),
    ("tensor 2, ZeRO 1", "1 process, ZeRO 1"),
    ("tensor 2, expert 2, ZeRO 2", "data 2, ZeRO 2"),
    ("data 4, expert 2, ZeRO 2", "data 2, tensor 2, expert 4, ZeRO 1"),
    ("data 2, tensor 2, expert 4, ZeRO 1", "1 process, ZeRO 0"),
    ("data 2, tensor 2, expert 4, ZeRO 1", "expert 2, ZeRO 1"),
    ("1 process, bf16", "data 2, bf16, ZeRO 2"),
    ("data 2, bf16, ZeRO 2", "expert 2, bf16, ZeRO 1"),
    ("expert 2, bf16, ZeRO 1", "tensor 2, bf16, ZeRO 2"),
    ("1 process, bf16", "1 process, ZeRO 1"),
    ("tensor 2, ZeRO 1", "1 process, bf16"),
    ("1 process, ZeRO 0", "data 2, ZeRO 3"),
    ("data 2, ZeRO 3", "expert 2, ZeRO 1"),
    ("expert 2, ZeRO 1", "data 4, expert 2, ZeRO 3"),
    ("data 4, expert 2, ZeRO 3", "tensor 2, expert 2, ZeRO 3"),
    ("tensor 2, expert 2, ZeRO 3", "expert 2, ZeRO 3"),
    ("expert 2, ZeRO 3", "expert 2, bf16, ZeRO 3, offload"),
    ("expert 2, bf16, ZeRO 3, offload", "expert 2, bf16, ZeRO 3"),
    ("expert 2, bf16, ZeRO 3", "data 2, bf16, ZeRO 2"),
    ("sequence 2, expert 2, ZeRO 2", "1 process, ZeRO 1"),
    ("data 4, expert 2, ZeRO 3", "sequence 2, expert 2, ZeRO 2"),
    ("1 process, bf16", "expert 2, replicated, bf16, ZeRO 1"),
    ("1 process, ZeRO 0", "expert 2, replicated, ZeRO 3"),
    ("data 4, expert 4, replicated, ZeRO 2", "expert 2, ZeRO 1"),
]
CASES = [
    *((*move, PARAMETERS) for move in MOVES),
    ("expert 2, ZeRO 1", "1 process, ZeRO 0", BUFFER),
    ("1 process, ZeRO 0", "expert 2, ZeRO 3", BUFFER),
    ("1 process, ZeRO 0", "tensor 2, expert 2, ZeRO 2", BUFFER),
]
EQUAL = 1e-6
"""Losses are of about 4, so this is two units in the last place of a float32."""

Trained = Callable[[str, str], tuple[Path, float]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The checkpoint a layout has trained and saved with a router, and the loss it has next."""

    @cache
    def train(name: str, router: str) -> tuple[Path, float]:
        ranks, layout = LAYOUTS[name]
        run = run_of(SHAPE[router], {"router": router}, **layout)
        run = run.model_copy(update={"run_dir": str(tmp_path_factory.mktemp("trained"))})
        return checkpoint_of(run, 2), run_distributed(ranks, train_here, run)[0]

    return train


def computes_alike(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two layouts round alike but for the order of fp32 sums."""
    if "bf16" not in (old.get("dtype"), new.get("dtype")):
        return True
    return all(old.get(key) == new.get(key) for key in ("dtype", "tensor"))


@pytest.mark.distributed
@pytest.mark.parametrize(("old", "new", "router"), CASES)
def test_a_move_changes_neither_weights_nor_moments_nor_the_next_loss(
    old: str, new: str, router: str, trained: Trained, tmp_path: Path
) -> None:
    source, loss = trained(old, router)
    ranks, layout = LAYOUTS[new]
    run = run_of(SHAPE[router], {"router": router}, **layout).model_copy(update={"run_dir": str(tmp_path)})
    losses = run_distributed(ranks, move_here, run, source)
    saved = tensors_of(source)
    if not computes_alike(LAYOUTS[old][1], layout):
        (loss, *_) = run_distributed(ranks, place_here, run, saved)
    moments = {name: value.any() for name, value in saved.items() if "exp_avg" in name and ".experts." in name}
    assert sum(moments.values()) >= len(moments) / 2, "most experts have been trained"
    assert any("bias_N" in name and value.any() for name, value in saved.items()) == (router == BUFFER)
    assert differing(tensors_of(checkpoint_of(run, 2)), saved) == []
    assert losses == [pytest.approx(loss, abs=EQUAL)] * ranks


@pytest.mark.distributed
def test_a_run_goes_on_under_another_layout(data: TinyData, tmp_path: Path) -> None:
    more: dict[str, Any] = {"moe": {"shared_experts": 1}, "checkpoint": {"every": 4, "keep": 9}}
    old = small_run(data, tmp_path / "old", parallel={"expert": 2, "zero_stage": 2}, **more)
    train_run(old, 2)
    new = small_run(data, tmp_path / "old", parallel={"tensor": 2, "zero_stage": 1}, **more)
    moved = restarted(new, tmp_path / "moved", 4)
    train_run(moved, 2)
    losses, expected = ([line["loss"] for line in history(run, "train")] for run in (moved, old))
    assert losses[:4] == expected[:4], "the history before the move stays"
    assert losses[4:7] == pytest.approx(expected[4:7], abs=1e-5)
