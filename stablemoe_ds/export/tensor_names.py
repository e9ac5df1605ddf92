"""From the tensors of a checkpoint to those of an exported folder: which, under what name, cut how."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.config.schema import ModelConfig, RunConfig
from stablemoe_ds.export.folder_settings import BY_ID, NETWORKS, router_of
from stablemoe_ds.tables.table import RoutingTable

SUBLAYER = {
    "norm_weight": "norm.weight",
    "norm_bias": "norm.bias",
    "w1": "mlp.up_proj.weight",
    "b1": "mlp.up_proj.bias",
    "w2": "mlp.down_proj.weight",
    "b2": "mlp.down_proj.bias",
}
ROUTER = {
    "centroids": "centroids",
    "bias_N": "bias",
    "threshold_N": "threshold",
    "gate.scale_N": "gate_scale",
    "gate.bias_N": "gate_bias",
}
DISTILLED, NETWORK = "moe.router.distilled.", "moe.router.network."
BLOCK = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "feed_forward.norm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_fc1": "feed_forward.mlp.up_proj",
    "mlp.linear_fc2": "feed_forward.mlp.down_proj",
}
WHOLE_MODEL = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "embedding.position_embeddings.weight": "model.embed_positions.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.final_layernorm.bias": "model.norm.bias",
    "output_layer.weight": "lm_head.weight",
}
SPLIT = {"ids_J": "model.split.ids", "row_JV": "model.split.rows", "share_Q": "model.split.share"}
"""What splits ids in a table, and in an exported folder."""
PLAIN_NAMES = {".feed_forward.norm.": ".post_attention_layernorm.", ".feed_forward.mlp.": ".mlp."}
"""What an exported folder calls parts of a block, and what Llama and Granite do."""


@dataclass(frozen=True)
class Exported:
    """One tensor of an exported folder. read: reads it; shape and dtype are known before."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


Cut = Callable[[Tensor], Tensor]


def exported_tensors(
    checkpoint: Checkpoint, table: RoutingTable | None, dtype: torch.dtype, plain: bool = False
) -> Iterator[Exported]:
    """Every tensor of the folder. Weights have ``dtype``, what is the router's is fp32, the table int32.

    plain: by the names of a Llama or Granite.

    Left out are distilled routers whose choices are in the table or are not used in stage 1, and centroids that
    neither choose nor weigh an expert.
    Raises ValueError for a tensor that has no place in an exported model.
    """
    blocks = block_of_layer(checkpoint.run)
    router = router_of(checkpoint)
    idle = router in BY_ID and not checkpoint.run.moe.gate_facts.affinity
    for source in checkpoint.tensors:
        if ".router.distilled." in source and router not in NETWORKS:
            continue
        if idle and source.endswith(".router.centroids") and ".distilled." not in source:
            continue
        for name, cut in _parts(source, checkpoint.run, blocks):
            whole = torch.empty(checkpoint.shape(source), device="meta")
            kept = torch.float32 if ".router." in name else dtype

            def read(source: str = source, cut: Cut = cut, kept: torch.dtype = kept) -> Tensor:
                return cut(checkpoint.read(source)).to(kept).contiguous()

            for ours, theirs in PLAIN_NAMES.items() if plain else ():
                name = name.replace(ours, theirs)
            yield Exported(name, tuple(cut(whole).shape), kept, read)
    if table is not None:
        for block, rows_VK in zip(table.blocks, table.expert_LVK, strict=True):
            name = f"model.layers.{block - 1}.moe.router.table"
            yield Exported(name, rows_VK.shape, torch.int32, partial(torch.tensor, rows_VK))
        for name, array in table.split_arrays().items():
            yield Exported(SPLIT[name], array.shape, torch.int32, partial(torch.tensor, array))


def block_of_layer(run: RunConfig) -> list[int]:
    """Block, from 0, of each layer of the stack: an MoE layer or a dense stack is a layer of its own there."""
    return [b - 1 for b in range(1, run.model.layers + 1) for _ in range(2 if b in run.moe.layers else 1)]


def _parts(source: str, run: RunConfig, blocks: list[int]) -> Iterable[tuple[str, Cut]]:
    """Names in an exported folder of what is cut from one tensor of a checkpoint."""
    if source in WHOLE_MODEL:
        return [(WHOLE_MODEL[source], _whole)]
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", source)
    if found is None:
        raise ValueError(f"{source} has no place in an exported model")
    at, rest = f"model.layers.{blocks[int(found[1])]}.", found[2]
    owner, _, leaf = rest.rpartition(".")
    gated = run.model.activation == "swiglu"
    if owner == "self_attention.linear_qkv":
        return [(f"{at}self_attn.{part}_proj.{leaf}", cut) for part, cut in _attention_cuts(run.model).items()]
    if owner == "mlp.linear_fc1" and gated:
        return _gate_and_up(f"{at}feed_forward.mlp.up_proj.{leaf}", _whole)
    if owner in BLOCK:
        return [(f"{at}{BLOCK[owner]}.{leaf}", _whole)]
    if (router := rest.removeprefix("moe.router.")) in ROUTER:
        return [(f"{at}moe.router.{ROUTER[router]}", _whole)]
    if rest.startswith(DISTILLED):
        return [(f"{at}{NETWORK}{rest.removeprefix(DISTILLED).removeprefix('features.')}", _whole)]
    stack = re.fullmatch(r"(?:moe\.experts\.(\d+)|moe\.(shared)|(stack))\.sublayers\.(\d+)\.(\w+)", rest)
    if stack is None or stack[5] not in SUBLAYER:
        raise ValueError(f"{source} has no place in an exported model")
    owner = f"moe.routed.{stack[1]}" if stack[1] else "moe.shared" if stack[2] else "stack"
    name = f"{at}{owner}.{stack[4]}.{SUBLAYER[stack[5]]}"
    cut = _whole if stack[1] else _only_row
    return _gate_and_up(name, cut) if gated and ".up_proj." in name else [(name, cut)]


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _only_row(tensor: Tensor) -> Tensor:
    """Of weights that are stacked over one expert."""
    return tensor[0]


def _gate_and_up(name: str, cut: Cut) -> list[tuple[str, Cut]]:
    """The two halves of swiglu's first matrix or bias, of which the gate is the first."""
    return [
        (name.replace(".up_proj.", ".gate_proj."), lambda tensor: cut(tensor).chunk(2)[0]),
        (name, lambda tensor: cut(tensor).chunk(2)[1]),
    ]


def _attention_cuts(model: ModelConfig) -> dict[str, Cut]:
    """Rows of the fused matrix stand by group of key and value heads: queries of the group, its key, its value."""
    groups = model.kv_heads or model.heads
    queries, width = model.heads // groups, model.hidden_size // model.heads

    def rows(first: int, last: int) -> Cut:
        return lambda whole: whole.unflatten(0, (groups, queries + 2, width))[:, first:last].flatten(0, 2)

    return {"q": rows(0, queries), "k": rows(queries, queries + 1), "v": rows(queries + 1, queries + 2)}
