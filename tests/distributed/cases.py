"""Runs, batches and the reference that the distributed tests compare with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.tables.builders import random_table
from stablemoe_ds.tables.table import RoutingTable
from tests.distributed.launch import run_distributed
from tests.distributed.worker import Outcome, assemble, train
from tests.model.reference import SlowStep, SlowTraining
from tests.tiny import VOCAB, tiny_run

SEQUENCES, LENGTH = 8, 12
PAPER = {"positions": "learned", "norm": "layernorm", "activation": "relu", "bias": True, "kv_heads": None}
SHAPES: dict[str, dict[str, Any]] = {
    "paper": {"model": PAPER, "moe": {"sublayers": 2}},
    "modern": {
        "model": {"tie_embeddings": False},
        "moe": {"placement": "replace", "top_k": 2, "shared_experts": 1},
    },
    "paper, learned gate": {"model": PAPER, "moe": {"gate": "learned"}},
    "modern, gate of one": {"model": {}, "moe": {"gate": "one", "placement": "replace", "top_k": 2}},
    "modern, block 1 along a table": {
        "model": {},
        "moe": {"placement": "replace", "top_k": 2, "table": "even", "table_layers": [1]},
    },
    "paper, shared": {"model": PAPER, "moe": {"shared_experts": 1, "distilled": {"lr_scale": 3.0}}},
}


def run_of(shape: str, moe: dict[str, Any] | None = None, dtype: str = "fp32", **layout: Any) -> RunConfig:
    """A run of one of :data:`SHAPES`. ``layout``: tensor, expert, zero, micro and recompute of section parallel."""
    names = {"zero": "zero_stage", "micro": "micro_batch"}
    parallel = {names.get(key, key): value for key, value in layout.items()}
    sections = {name: dict(section) for name, section in SHAPES[shape].items()}
    sections["model"] |= {"layers": 2, "hidden_size": 16, "ffn_hidden_size": 24}
    sections["moe"] |= {"layers": [1, 2], **(moe or {})}
    return tiny_run(
        **sections,
        data={"sequence_length": LENGTH},
        # A large epsilon: without one Adam turns rounding errors of gradients that ought to be zero into full steps.
        optimizer={"lr": 1e-2, "clip": 0.5, "weight_decay": 0.1, "eps": 1e-4},
        schedule={"steps": 10, "tokens_per_step": SEQUENCES * LENGTH, "decay": "constant"},
        parallel=parallel,
        precision={"dtype": dtype},
    )


def batch(seed: int, sequences: int = SEQUENCES) -> Batch:
    """A global micro-batch of random ids; the end of some sequences is padding, some real ids are not scored."""
    ids = torch.randint(VOCAB, (sequences, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    real = torch.ones(sequences, LENGTH, dtype=torch.bool)
    real[0, 7:] = False
    real[-1, 2:] = False
    return Batch(ids[:, :-1], ids[:, 1:], real, real & (ids[:, 1:] != 0))


def three_updates(accumulation: int) -> list[list[Batch]]:
    """The micro-batches of three updates."""
    per_micro = SEQUENCES // accumulation
    return [[batch(10 * step + micro, per_micro) for micro in range(accumulation)] for step in range(3)]


@cache
def start(shape: str, kind: str = "word") -> dict[str, torch.Tensor]:
    """The run's own start, every tensor moved so that biases, norms and W2 matter from the first update."""
    (alone,) = run_distributed(1, train, run_of(shape, {"distilled": {"kind": kind}}), None, [], 0)
    random = torch.Generator().manual_seed(17)
    fresh = assemble([alone.start])
    return {name: w + torch.randn(w.shape, generator=random) * 0.1 for name, w in fresh.items()}


def table_of(shape: str) -> RoutingTable | None:
    """What some layers follow from the first update on, in a shape that has such layers."""
    moe = run_of(shape).moe
    if not moe.table_layers:
        return None
    expert_LVK = random_table(VOCAB, moe.experts, moe.top_k, len(moe.table_layers), seed=4)
    return RoutingTable(expert_LVK, moe.experts, tuple(moe.table_layers))


def reference(
    shape: str, updates: Sequence[Sequence[Batch]], switch: int
) -> tuple[list[SlowStep], dict[str, torch.Tensor]]:
    """What every update sees and the weights at the end, from one process in float64."""
    table = table_of(shape)
    followed = dict(zip(table.blocks, table.expert_LVK.tolist(), strict=True)) if table else {}
    slow = SlowTraining(run_of(shape), start(shape), followed)
    steps = [slow.update(micro_batches, frozen=step >= switch) for step, micro_batches in enumerate(updates)]
    return steps, {name: w.detach() for name, w in slow.w.items()}


def assert_same(
    ranks: Sequence[Outcome], wanted: Sequence[SlowStep], weights: dict[str, torch.Tensor], error: float = 1e-5
) -> None:
    """Every figure on every rank, and every tensor, up to ``error``."""
    for rank in ranks:
        for step, (got, slow) in enumerate(zip(rank.steps, wanted, strict=True)):
            assert got["counts"] == slow.counts_LN
            figures = {name: getattr(slow, name) for name in ("loss", "balance", "distill", "norm")}
            assert {name: got[name] for name in figures} == pytest.approx(figures, rel=error, abs=error / 10), (
                f"update {step}"
            )
    end = assemble([rank.end for rank in ranks])
    assert end.keys() == weights.keys()
    worst = sorted(((float((end[name] - weights[name]).abs().max()), name) for name in end), reverse=True)
    assert worst[0][0] < error, worst[:5]
