"""An exported model computes what ours computes, whatever the model looks like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stablemoe_ds.export.exported_folder import export
from tests.export.opened import opened, some_ids
from tests.export.small_checkpoints import SPLITTING, SavedModel

PAPER = {
    "positions": "learned",
    "norm": "layernorm",
    "activation": "relu",
    "bias": True,
    "kv_heads": 4,
}
SHAPES: dict[str, dict[str, Any]] = {
    "modern": {},
    "paper": {"model": PAPER},
    "untied": {"model": {"tie_embeddings": False}},
    "plain embedding, gelu": {"model": {"embedding": "plain", "activation": "gelu"}},
    "swiglu with biases": {"model": {"bias": True, "norm": "layernorm"}},
    "another base": {"model": {"rope_base": 500, "norm_epsilon": 1e-3}},
    "two of four, one shared": {"moe": {"top_k": 2, "shared_experts": 1}},
    "stacks in the place of the block's own layer": {
        "model": PAPER,
        "moe": {"sublayers": 2, "placement": "replace", "shared_experts": 2, "ffn_hidden_size": 24},
    },
    "normalized input": {"moe": {"router_input": "normalized"}},
    "gate doubled": {"moe": {"gate": "doubled"}},
    "gate learned": {"moe": {"gate": "learned", "top_k": 2}},
    "gate one": {"moe": {"gate": "one"}},
    "hash": {"moe": {"router": "hash"}},
    "table with a gate": {"moe": {"router": "table", "table": "some.safetensors", "gate": "sigmoid"}},
    "table that splits ids": {"moe": {"router": "table", "table": SPLITTING, "gate": "sigmoid", "top_k": 2}},
    "BASE layers, frozen": {"moe": {"router": "base_fixed"}},
    "dense": {"moe": {"router": "dense", "layers": []}},
    "dense, deeper": {"moe": {"router": "dense_deeper", "sublayers": 2}},
    "dense, wider": {"moe": {"router": "dense_wider", "sublayers": 2, "placement": "replace"}},
    "learned": {"stage": 1},
    "learned, best two, gate learned": {"stage": 1, "moe": {"top_k": 2, "gate": "learned"}},
    "switch": {"stage": 1, "moe": {"router": "switch"}},
    "switch, gate doubled": {"stage": 1, "moe": {"router": "switch", "gate": "doubled"}},
    "top-1": {"stage": 1, "moe": {"router": "topk"}},
    "top-2, one shared": {"stage": 1, "moe": {"router": "topk", "top_k": 2, "shared_experts": 1}},
    "a table in one of two layers, softmax": {
        "stage": 1,
        "moe": {"router": "switch", "table": "even", "table_layers": [2]},
    },
    "a table in one of two layers, gates normalized": {
        "stage": 1,
        "moe": {"router": "topk", "top_k": 2, "table": "even", "table_layers": [3]},
    },
    "a table in one of two layers, gate one": {
        "stage": 1,
        "moe": {"gate": "one", "table": "even", "table_layers": [2]},
    },
    "a table that splits ids in one of two layers": {
        "stage": 1,
        "moe": {"router": "topk", "top_k": 2, "table": SPLITTING, "table_layers": [2]},
    },
    "BASE layers": {"stage": 1, "moe": {"router": "base"}},
    "expert choice": {"stage": 1, "moe": {"router": "expert_choice", "top_k": 2}},
    "expert choice, learned gate, one shared": {
        "stage": 1,
        "moe": {"router": "expert_choice", "gate": "learned", "shared_experts": 1},
    },
    "frozen bigram": {"moe": {"distilled": {"kind": "bigram"}}},
    "frozen bigram, best two": {"moe": {"distilled": {"kind": "bigram", "bigram_start": "itself"}, "top_k": 2}},
    "frozen cnn, gate one": {"moe": {"distilled": {"kind": "cnn"}, "gate": "one"}},
    "frozen transformer": {"moe": {"distilled": {"kind": "transformer", "layers": 2}, "layers": [1, 3]}},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_are_ours(saved: Callable[..., SavedModel], tmp_path: Path, shape: dict[str, Any]) -> None:
    ours = saved(**shape)
    export(ours.path, tmp_path / "out")
    theirs, report = opened(tmp_path / "out")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = some_ids()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.logits(ids), atol=1e-5, rtol=1e-5)
