"""From the tensors of an exported folder back to those of a checkpoint: the inverse of ``tensor_names``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from stablemoe_ds.config.schema import ModelConfig, RunConfig
from stablemoe_ds.export.tensor_names import (
    BLOCK,
    DISTILLED,
    NETWORK,
    PLAIN_NAMES,
    ROUTER,
    SPLIT,
    SUBLAYER,
    WHOLE_MODEL,
)

TABLE = re.compile(r"model\.layers\.\d+\.moe\.router\.table")
_PARTS = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "gate_proj": 0, "up_proj": 1}
"""Tensors that are one in a checkpoint, in their order there."""


def exported_name(name: str, plain: bool) -> str:
    """The name that an exported folder has for a tensor; plain: of a Llama or Granite."""
    for ours, theirs in PLAIN_NAMES.items() if plain else ():
        name = name.replace(theirs, ours, 1)
    return name


def canonical_tensors(tensors: Mapping[str, Tensor], run: RunConfig) -> dict[str, Tensor]:
    """fp32, by canonical name, from tensors by their names in an exported folder. Tables, and what splits their ids,
    are left out.

    Raises ValueError for a name that no exported folder has, and for a part that is alone.
    """
    groups: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if not TABLE.fullmatch(name) and name not in SPLIT.values():
            whole, place = _canonical(name, run.moe.layers)
            groups.setdefault(whole, {})[place] = tensor.float()
    return {name: _joined(name, [parts[i] for i in sorted(parts)], run.model) for name, parts in groups.items()}


def _canonical(name: str, moe_layers: Sequence[int]) -> tuple[str, int]:
    """Name of the tensor of a checkpoint that this one is a part of, and which part."""
    if name in (whole := {theirs: ours for ours, theirs in WHOLE_MODEL.items()}):
        return whole[name], 0
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if found is None:
        raise ValueError(name)
    block, rest = int(found[1]), found[2]
    # An MoE layer or a dense stack is a layer of its own in our stack, behind its block.
    layer = block + sum(number - 1 < block for number in moe_layers)
    owner, _, leaf = rest.rpartition(".")
    if rest.startswith(("moe.", "stack.")):
        return f"decoder.layers.{layer + 1}.{_in_moe_layer(rest, name)}", _PARTS.get(owner.rsplit(".", 1)[-1], 0)
    part = owner.rsplit(".", 1)[-1]
    if owner.startswith("self_attn.") and part in _PARTS:
        return f"decoder.layers.{layer}.self_attention.linear_qkv.{leaf}", _PARTS[part]
    if part == "gate_proj":
        owner = owner.replace("gate_proj", "up_proj")
    names = {theirs: ours for ours, theirs in BLOCK.items()}
    if owner not in names:
        raise ValueError(name)
    return f"decoder.layers.{layer}.{names[owner]}.{leaf}", _PARTS.get(part, 0)


def _in_moe_layer(rest: str, name: str) -> str:
    router = {theirs: ours for ours, theirs in ROUTER.items()}
    if (leaf := rest.removeprefix("moe.router.")) in router:
        return f"moe.router.{router[leaf]}"
    if rest.startswith(NETWORK):
        part = rest.removeprefix(NETWORK)
        return f"{DISTILLED}{part if part == 'centroids' else f'features.{part}'}"
    stack = re.fullmatch(r"(?:moe\.routed\.(\d+)|moe\.(shared)|(stack))\.(\d+)\.(.+)", rest)
    leaves = {theirs: ours for ours, theirs in SUBLAYER.items()}
    leaf = stack[5].replace("gate_proj", "up_proj") if stack else ""
    if stack is None or leaf not in leaves:
        raise ValueError(name)
    owner = f"moe.experts.{stack[1]}" if stack[1] else "moe.shared" if stack[2] else "stack"
    return f"{owner}.sublayers.{stack[4]}.{leaves[leaf]}"


def _joined(name: str, parts: Iterable[Tensor], model: ModelConfig) -> Tensor:
    """One tensor of a checkpoint from its parts, in their order."""
    parts = list(parts)
    fused = ".linear_fc1." in name or re.search(r"\.sublayers\.\d+\.[wb]1$", name)
    expected = 3 if ".linear_qkv." in name else 2 if fused and model.activation == "swiglu" else 1
    if len(parts) != expected:
        raise ValueError(f"{name}, whose {expected} parts are not all there")
    if expected == 3:
        groups = model.kv_heads or model.heads
        # Rows stand by group of key and value heads: queries of the group, its key, its value.
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)
    whole = parts[0] if expected == 1 else torch.cat(parts)
    stacked = ".moe.shared." in name or ".stack." in name
    return whole[None] if stacked else whole
