"""A small complete run in YAML, and runs made from it by overrides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stablemoe_ds.config.load import load_run
from stablemoe_ds.config.schema import RunConfig

SMALL = """
model: {layers: 4, hidden_size: 32, heads: 4, kv_heads: 2, ffn_hidden_size: 64, vocab_size: 100}
moe: {layers: [2], experts: 8}
data: {sequence_length: 16}
optimizer: {lr: 6e-4}
schedule: {steps: 100, tokens_per_step: 512}
stages: {at_step: 10}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Path of the small run."""
    path = tmp_path / "run.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def make(small: Path) -> Callable[..., RunConfig]:
    """``make("key=value", ...)``: the small run with overrides."""
    return lambda *overrides: load_run(small, overrides)
