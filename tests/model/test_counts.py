"""The parameters a model really has, against what ``config.costs`` says it will have."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import pytest

from stablemoe_ds.config.costs import parameters

PAPER = {"positions": "learned", "norm": "layernorm", "activation": "relu", "bias": True, "kv_heads": None}
SHAPES = {
    "modern": {},
    "a table in one of two layers": {"moe": {"table": "even", "table_layers": [2]}},
    "a table in one of two layers, gate one": {
        "moe": {"router": "switch", "top_k": 2, "gate": "one", "table": "even", "table_layers": [2]}
    },
    "paper": {"model": PAPER, "moe": {"sublayers": 3}},
    "untied, replace, top 2, shared": {
        "model": {"tie_embeddings": False},
        "moe": {"placement": "replace", "top_k": 2, "shared_experts": 2, "sublayers": 2},
    },
    "gelu, bias, own expert width, shared": {
        "model": {**PAPER, "activation": "gelu", "kv_heads": 1},
        "moe": {"ffn_hidden_size": 20, "shared_experts": 1},
    },
    "modern with bias, cnn": {"model": {"bias": True}, "moe": {"distilled": {"kind": "cnn", "dim": 9}}},
    "bigram": {"moe": {"distilled": {"kind": "bigram"}}},
    "transformer": {"moe": {"distilled": {"kind": "transformer", "layers": 2}, "experts": 6, "layers": [1]}},
    "dense": {"moe": {"router": "dense", "layers": []}},
    "dense, deeper": {"model": PAPER, "moe": {"router": "dense_deeper", "sublayers": 2}},
    "dense, wider, in place": {"moe": {"router": "dense_wider", "sublayers": 2, "placement": "replace"}},
    "switch": {"moe": {"router": "switch", "sublayers": 2}},
    "base, distilled": {"moe": {"router": "base_fixed", "shared_experts": 1}},
    "hash": {"moe": {"router": "hash", "top_k": 2}},
    "hash, doubled gate": {"moe": {"router": "hash", "gate": "doubled"}},
    "hash, learned gate": {"moe": {"router": "hash", "gate": "learned", "top_k": 2}},
    "learned gate": {"moe": {"gate": "learned"}},
    "gate of one": {"moe": {"gate": "one"}},
    "top-k": {"moe": {"router": "topk", "top_k": 3}},
    "expert choice": {"moe": {"router": "expert_choice"}},
}


def component(name: str) -> str:
    """Part of the model that a parameter belongs to, by its name."""
    for mark, part in (
        (".distilled.", "distilled"),
        (".router.", "router"),
        (".experts.", "expert"),
        (".shared.", "shared_experts"),
        (".stack.", "shared_experts"),
        ("layernorm", "norms"),
        (".self_attention.", "attention"),
        (".mlp.", "ffn"),
        ("word_embeddings", "embedding"),
        ("position_embeddings", "positions"),
        ("output_layer", "output"),
    ):
        if mark in name:
            return part
    raise AssertionError(f"{name} belongs to no component")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_component_has_the_counted_parameters(shape, fresh):
    model = fresh(**SHAPES[shape])
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        found[component(name)] += parameter.numel()
    counts, moe = parameters(model.run_config), model.run_config.moe
    parts = [part for part in asdict(counts) if part != "served"]
    assert {part: found[part] for part in parts} == {part: getattr(counts, part) for part in parts}
    assert counts.total == sum(found.values())
    assert counts.served * moe.experts == counts.expert * moe.top_k
