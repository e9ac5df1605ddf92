"""A model small enough to build in a blink, for tests of everything around it."""

from __future__ import annotations

from typing import Any

from stablemoe_ds.config.schema import RunConfig

VOCAB = 64


def tiny_run(**sections: Any) -> RunConfig:
    """Width 32, vocabulary 64, two MoE layers of 4 experts. A section given as a dict is laid over the default one."""
    run: dict[str, Any] = {
        "model": {
            "layers": 3,
            "hidden_size": 32,
            "heads": 4,
            "kv_heads": 2,
            "ffn_hidden_size": 64,
            "vocab_size": VOCAB,
        },
        "moe": {"layers": [2, 3], "experts": 4},
        "data": {"sequence_length": 16},
        "optimizer": {"lr": 1e-3},
        "schedule": {"steps": 4, "tokens_per_step": 64},
        "logging": {"tensorboard": False},
    }
    for name, section in sections.items():
        known = run.get(name, {})
        run[name] = {**known, **section} if isinstance(section, dict) and isinstance(known, dict) else section
    return RunConfig.model_validate(run)
