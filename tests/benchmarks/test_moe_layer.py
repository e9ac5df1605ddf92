"""A layer that fails costs its own column, not the figures of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.graphed import GraphedStage
from benchmarks.moe_layer import routes_of, sample, tables, working
from benchmarks.our_layer import VOCAB, Ours, Stage
from benchmarks.peers import Shape
from stablemoe_ds.routing.routes import TokenView

CPU = torch.device("cpu")


def broken() -> nn.Module:
    raise RuntimeError("no such random state\nand more")


def step(layer: nn.Module) -> None:
    layer(torch.ones(2, 2)).sum().backward()


def test_a_layer_that_fails_is_left_out_with_its_reason() -> None:
    makers = {"dense": lambda: nn.Linear(2, 2), "peer": broken, "wide": lambda: nn.Linear(3, 3)}
    layers, reasons = working(makers, CPU, step)
    assert list(layers) == ["dense"]
    assert reasons["peer"] == "RuntimeError: no such random state"
    assert reasons["wide"].startswith("RuntimeError: mat1")


def test_without_the_bound_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(RuntimeError):
        working({"dense": broken}, CPU, step)


def test_its_column_is_empty_and_the_reason_stands_below() -> None:
    figures: dict[str, Any] = {"dense": 1.0, "ours": 1.5}
    shape = {"tokens": 4, "hidden_size": 2, "experts": 2, "load": "uniform", "dtype": "fp32"}
    row = {"shape": shape, "seconds": figures, "ratio_to_dense": figures, "bound_to_dense": 1.0}
    page = tables([{**row, "peak_bytes": {"dense": 2**20}, "peak_to_dense": figures, "failed": {"peer": "no state"}}])
    assert "| bound | ours | peer |" in page
    assert "| 1.50 |  |" in page
    assert page.endswith("peer failed: no state")


def test_graphs_follow_the_routes_of_the_call_and_not_those_they_were_captured_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda module, *_, **__: module)  # all but the capture
    shape = Shape(tokens=32, hidden_size=16, ffn_hidden_size=32, experts=4, load="skewed", dtype="fp32")
    ids = torch.randint(VOCAB, (1, 32), generator=torch.Generator().manual_seed(0))
    tokens, expert_TK = TokenView(ids, torch.ones(32, dtype=torch.bool)), routes_of(shape, ids)
    stage, hidden = Stage(Ours(shape), tokens, expert_TK), sample(shape, CPU)
    stage.ours.check(hidden, expert_TK[:, 0], GraphedStage(stage, hidden)(hidden))
