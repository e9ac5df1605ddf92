"""Experts placed on ranks by load: the model that one process trains, with every rank nearer to the mean load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.tables.expert_places import NO_EXPERT
from stablemoe_ds.tables.table import RoutingTable
from tests.distributed.launch import run_distributed
from tests.training.runs import (
    STEPS,
    SWITCH,
    VOCAB,
    TinyData,
    checkpoint_of,
    history,
    restarted,
    small_run,
    tensors_of,
    train_here,
    train_run,
)

pytestmark = pytest.mark.distributed
BY_LOAD = {"expert": 2, "expert_placement": "load"}
ALIKE = {"rtol": 1e-4, "atol": 1e-6}
LARGE_EPSILON = {"lr": 1e-2, "eps": 1e-4}
"""Without one Adam turns rounding errors of gradients that ought to be zero into full steps."""


def held_by(run: RunConfig) -> list[list[int]]:
    """What a rank does: train; the experts of this rank, by MoE layer."""
    from stablemoe_ds.moe.layer import MoELayer

    held: list[list[int]] = []
    original = MoELayer.set_deepspeed_parallelism

    def watched(self: Any, *arguments: Any, **named: Any) -> None:
        held.append(list(self.held_experts))
        original(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoELayer, "set_deepspeed_parallelism", watched)
        train_here(run)
    return held


def assert_same_training(one: RunConfig, other: RunConfig) -> None:
    """Weights and moments by name, and every loss and load, up to the order of sums."""
    ours, theirs = (tensors_of(checkpoint_of(run, STEPS)) for run in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor.float(), theirs[name].float(), err_msg=name, **ALIKE)
    for ours_line, their_line in zip(history(one, "train"), history(other, "train"), strict=True):
        assert ours_line["load"] == their_line["load"]
        assert ours_line["loss"] == pytest.approx(their_line["loss"], rel=1e-5)


def skewed_table(path: Path) -> None:
    """Experts 0 and 1 are the heavy ones of the first layer, which by number share a rank; 1 and 3 of the second."""
    ids = np.arange(VOCAB)
    heavy = np.where(ids % 8 < 7, ids % 2, 2 + ids // 8 % 2)
    second = np.array([1, 3, 0, 2])[heavy]
    RoutingTable(np.stack([heavy, second])[..., None].astype(np.int32), 4, (1, 2)).save(path)


@pytest.mark.parametrize("replicated", [0, 1])
def test_two_processes_train_what_one_does(replicated: int, data: TinyData, tmp_path: Path) -> None:
    skewed_table(tmp_path / "table")
    sections: dict[str, dict[str, Any]] = {
        "moe": {"router": "table", "table": str(tmp_path / "table"), "layers": [1, 2], "gate": "doubled"},
        "optimizer": LARGE_EPSILON,
        "stages": {"at_step": None},
    }
    alone = small_run(data, tmp_path / "alone", **sections)
    spread = small_run(data, tmp_path / "spread", **sections, parallel=BY_LOAD | {"replicated_experts": replicated})
    train_run(alone)
    first, second = run_distributed(2, held_by, spread)
    for layer, (heavy, other) in enumerate([(0, 1), (1, 3)]):
        held = [first[layer], second[layer]]
        everywhere = set(held[0]) & set(held[1])
        assert sorted({*held[0], *held[1]} - {NO_EXPERT}) == [0, 1, 2, 3]
        if replicated:
            assert len(everywhere) == 1
            assert everywhere < {heavy, other}
        else:
            assert not everywhere
            assert not any({heavy, other} <= set(experts) for experts in held), "the two heavy ones are apart"
    assert_same_training(alone, spread)


def test_a_learned_table_places_experts_when_the_run_is_continued(data: TinyData, tmp_path: Path) -> None:
    """Weights and moments of every expert find the rank that now holds it."""
    often = {"every": SWITCH + 1, "keep": 9}
    whole = small_run(data, tmp_path / "whole", parallel={"expert": 2}, checkpoint=often, optimizer=LARGE_EPSILON)
    train_run(whole, 2)
    parallel = whole.parallel.model_copy(update={"expert_placement": "load", "replicated_experts": 1})
    resumed = restarted(whole, tmp_path / "resumed", SWITCH + 1).model_copy(update={"parallel": parallel})
    table = RoutingTable.read(checkpoint_of(whole, SWITCH + 1) / "routing_table.safetensors")
    counts = np.load(checkpoint_of(whole, SWITCH + 1) / "token_counts.npy")
    load_N = table.expert_load(counts)[0]
    ((first,), (second,)) = run_distributed(2, held_by, resumed)
    assert sorted({*first, *second} - {NO_EXPERT}) == [0, 1, 2, 3]
    assert set(first) & set(second) == {int(load_N.argmax())}, "the heaviest is on both"
    assert_same_training(whole, resumed)
