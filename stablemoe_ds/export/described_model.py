"""What the config.json of a folder says of its model, in the words of ``StableMoEConfig``; and in those of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from stablemoe_ds.config.messages import show
from stablemoe_ds.errors import UserError
from stablemoe_ds.files import open_file

PLAIN = ("llama", "granite")
"""Classes of transformers whose dense models ours computes as well; ``model_type`` names them."""
WORDS = {
    "vocab_size": "model.vocab_size",
    "hidden_size": "model.hidden_size",
    "intermediate_size": "model.ffn_hidden_size",
    "num_hidden_layers": "model.layers",
    "num_attention_heads": "model.heads",
    "num_key_value_heads": "model.kv_heads",
    "positions": "model.positions",
    "rope_base": "model.rope_base",
    "norm": "model.norm",
    "norm_eps": "model.norm_epsilon",
    "activation": "model.activation",
    "bias": "model.bias",
    "embedding_multiplier": "model.embedding",
    "tie_word_embeddings": "model.tie_embeddings",
    "moe_blocks": "moe.layers",
    "placement": "moe.placement",
    "routed_experts": "moe.experts",
    "experts_per_token": "moe.top_k",
    "expert_intermediate_size": "moe.ffn_hidden_size",
    "expert_sublayers": "moe.sublayers",
    "shared_intermediate_size": "moe.shared_experts (their width)",
    "shared_sublayers": "moe.shared_experts (their sublayers)",
    "stack_intermediate_size": "moe.router (width of its dense stack)",
    "stack_sublayers": "moe.router (sublayers of its dense stack)",
    "router_input": "moe.router_input",
    "table_blocks": "moe.table_layers",
    "gate": "moe.gate",
    "network_width": "moe.distilled.dim",
    "network_layers": "moe.distilled.layers",
    "network_heads": "model.heads (of the distilled router)",
    "network_start": "moe.distilled.bigram_start",
    "network_document_end": "data.eos_id (with data.document_mask)",
}
"""What a run calls each setting."""


def described_model(folder: Path) -> dict[str, Any]:
    """The fields of ``StableMoEConfig`` for the model in a folder of ``stablemoe export`` or of transformers.

    Raises UserError if it cannot be read, or with a line for each thing that this package does not compute.
    """
    path = folder / "config.json"
    try:
        with open_file(path) as file:
            config = json.loads(file.read())
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no configuration of a model: {error!r}") from error
    if kind == "stablemoe":
        return dict(config)
    if kind not in PLAIN:
        raise UserError(
            f"{path}: model_type: got {show(kind)}: expected stablemoe, which 'stablemoe export' writes, "
            f"or a dense {' or '.join(PLAIN)}"
        )
    try:
        return _plain(config, path)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no configuration of a {kind} model: {error!r}") from error


def _plain(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A Llama or Granite as transformers 5 and older versions write it; defaults are the library's."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    multiplier = config.get("embedding_multiplier", 1.0)
    attention = (
        config.get("attention_multiplier", 1.0) if config["model_type"] == "granite" else (width // heads) ** -0.5
    )
    needed = {  # name -> (what the folder has, what this package computes)
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "head_dim": (config.get("head_dim") or width // heads, width // heads),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
        "rope_theta": (base, round(base)),
        "residual_multiplier": (config.get("residual_multiplier", 1.0), 1.0),
        "logits_scaling": (config.get("logits_scaling", 1.0), 1.0),
        "quantization_config": (config.get("quantization_config"), None),
    }
    wrong = {name: pair for name, pair in needed.items() if pair[0] != pair[1]}
    if not math.isclose(attention, (width // heads) ** -0.5):
        wrong["attention_multiplier"] = (attention, (width // heads) ** -0.5)
    if not any(math.isclose(multiplier, works) for works in (1.0, math.sqrt(width))):
        wrong["embedding_multiplier"] = (multiplier, math.sqrt(width))
    if wrong:
        raise UserError(
            "\n".join(
                f"{path}: {k}: got {show(got)}: this package computes {show(works)} only"
                for k, (got, works) in wrong.items()
            )
        )
    return {
        "model_type": config["model_type"],
        "vocab_size": config["vocab_size"],
        "hidden_size": width,
        "intermediate_size": config["intermediate_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "max_position_embeddings": config.get("max_position_embeddings"),
        "positions": "rope",
        "rope_base": round(base),
        "norm": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": "swiglu",
        "bias": False,
        "embedding_multiplier": multiplier,
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }


def in_words(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run has to say for a model with these settings, by the run's own names. The router is not among them."""
    words = {key: settings[name] for name, key in WORDS.items() if settings.get(name) is not None}
    scaled = math.isclose(settings["embedding_multiplier"], math.sqrt(settings["hidden_size"]))
    words["model.embedding"] = "scaled" if scaled else "plain"
    if settings["positions"] == "learned":
        words["data.sequence_length"] = settings["max_position_embeddings"]
        words.pop("model.rope_base")
    for key, name in (("moe.layers", "moe_blocks"), ("moe.table_layers", "table_blocks")):
        words[key] = [block + 1 for block in settings.get(name, [])]
    if not words["moe.layers"]:
        words.pop("moe.placement", None)
    unused = [key for key in words if key.startswith("moe.") and words[key] in (0, None)]
    return {key: value for key, value in words.items() if key not in unused}
