"""What the config.json of an exported folder says, and which checkpoints have no such folder."""

from __future__ import annotations

import math
from typing import Any

from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.config.costs import shared_stack
from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError

MODELING_FILE = "modeling_stablemoe.py"
CHOOSES_BY = {"softmax": "softmax", "normalized": "biased_sigmoid"}
"""What the best experts of a learned router are best at, by the router's own gate; "affinity" for all others."""
NETWORKS = ("bigram", "cnn", "transformer")
"""Routers that see the ids up to a token; frozen, they choose as a table does."""
BY_ID = ("table", *NETWORKS)


def router_of(checkpoint: Checkpoint) -> str | None:
    """What exported routers choose by, as ``StableMoEConfig.router`` has it; None for a dense model.

    Where some layers follow a table and others learn, it is what those choose by.

    A checkpoint of stage 1 is exported with its learned routers, which are what it was trained with.
    Raises UserError for a checkpoint that has not built its table yet.
    """
    moe, stage = checkpoint.run.moe, checkpoint.progress.stage
    if not moe.facts.routed:
        return None
    table = checkpoint.table()
    if table is not None and len(table.blocks) == len(moe.layers):
        return "table"
    if moe.fixed_layers and table is None:
        raise UserError(
            f"checkpoint {checkpoint.path} holds no routing table yet: train it, and export the next checkpoint"
        )
    if stage == 2:
        return moe.distilled.kind
    return learned_router(moe)


def learned_router(moe: MoEConfig) -> str:
    """What a router that learns chooses by in evaluation: where experts choose tokens, by thresholds."""
    return "threshold" if moe.facts.experts_choose else CHOOSES_BY.get(moe.facts.gate, "affinity")


def model_settings(run: RunConfig, vocab_size: int, router: str | None) -> dict[str, Any]:
    """The fields of ``StableMoEConfig`` (``modeling_stablemoe.py``) that describe this model."""
    m, moe = run.model, run.moe
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": m.hidden_size,
        "intermediate_size": m.ffn_hidden_size,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv_heads or m.heads,
        "max_position_embeddings": run.data.sequence_length,
        "positions": m.positions,
        "rope_base": m.rope_base,
        "norm": m.norm,
        "norm_eps": m.norm_epsilon,
        "activation": m.activation,
        "bias": m.bias,
        "embedding_multiplier": math.sqrt(m.hidden_size) if m.embedding == "scaled" else 1.0,
        "tie_word_embeddings": m.tie_embeddings,
        "moe_blocks": [block - 1 for block in moe.layers],
        "placement": moe.placement,
    }
    width, depth = shared_stack(run)
    if router is None:
        return settings | {"stack_intermediate_size": width, "stack_sublayers": depth}
    if router in NETWORKS:
        is_transformer = router == "transformer"
        settings |= {
            "network_width": m.hidden_size if is_transformer else moe.distilled.dim,
            "network_layers": moe.distilled.layers,
            "network_heads": m.heads,
            "network_start": moe.distilled.bigram_start,
            "network_document_end": None if run.data.document_mask == "none" else run.data.eos_id,
        }
    if moe.table_layers and router != "table":
        settings["table_blocks"] = [block - 1 for block in moe.table_layers]
    return settings | {
        "routed_experts": moe.experts,
        "experts_per_token": moe.top_k,
        "expert_intermediate_size": moe.ffn_hidden_size or m.ffn_hidden_size,
        "expert_sublayers": moe.sublayers,
        "shared_intermediate_size": width,
        "shared_sublayers": depth,
        "router": router,
        "router_input": "normalized" if moe.normalizes_input else "raw",
        "gate": moe.gate_name,
    }


def plain_class(settings: dict[str, Any]) -> str | None:
    """The class of transformers that computes the same, so that a folder needs no code; None: there is none.

    A dense model of the modern shape is a Llama; with a scaled embedding it is a Granite, which has a factor for that.
    """
    modern = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "moe_blocks": []}
    if any(settings[name] != value for name, value in modern.items()):
        return None
    return "Llama" if settings["embedding_multiplier"] == 1.0 else "Granite"


def folder_config(settings: dict[str, Any], dtype: str, special_ids: dict[str, int]) -> dict[str, Any]:
    """config.json. dtype: as torch names it. special_ids: bos, eos and pad as transformers names them."""
    plain = plain_class(settings)
    if plain is not None:
        described = {"architectures": [f"{plain}ForCausalLM"], "model_type": plain.lower(), **_plain_settings(settings)}
        return {**described, "dtype": dtype, **special_ids}
    module = MODELING_FILE.removesuffix(".py")
    return {
        "architectures": ["StableMoEForCausalLM"],
        "model_type": "stablemoe",
        "auto_map": {
            "AutoConfig": f"{module}.StableMoEConfig",
            "AutoModel": f"{module}.StableMoEModel",
            "AutoModelForCausalLM": f"{module}.StableMoEForCausalLM",
        },
        "dtype": dtype,
        **settings,
        **special_ids,
    }


def _plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What a Llama or Granite calls the same. The base of RoPE has two places: of transformers 5 and of older ones."""
    shared = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "tie_word_embeddings",
    )
    base, head_width = float(settings["rope_base"]), settings["hidden_size"] // settings["num_attention_heads"]
    named = {
        "hidden_act": "silu",
        "rms_norm_eps": settings["norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "rope_theta": base,
        "attention_bias": False,
        "mlp_bias": False,
    }
    if plain_class(settings) == "Granite":
        named |= {
            "embedding_multiplier": settings["embedding_multiplier"],
            "attention_multiplier": head_width**-0.5,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        }
    return {name: settings[name] for name in shared} | named
