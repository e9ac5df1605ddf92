"""A layer that fails costs its own column, not the figures of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.moe_layer import tables, working

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
