"""A Mixture of Experts from a dense model, as a function on whole tensors by name.

At first the new model computes the same as the dense one:

- Experts after a block start as in a new model, with W2 = 0: they add nothing, whatever the router chooses.
- Experts instead of a block's feed-forward layer are copies of it, with W2 and its bias divided by the
  sum of a token's gates when all experts are equally good (:func:`neutral_gate`). With a gate of 1 (router ``hash``),
  and with router ``topk`` and at least two experts per token, the sum always has this value. Other gates depend on
  the token: the layer's output differs from the dense layer's as far as the sum of its gates differs from that value.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed.placement import ALONE
from stablemoe_ds.errors import UserError
from stablemoe_ds.model.gpt import build_moe_layer
from stablemoe_ds.model.initialize import start_value
from stablemoe_ds.model.layout import pieces

COPIED = {
    "pre_mlp_layernorm.weight": "norm_weight",
    "pre_mlp_layernorm.bias": "norm_bias",
    "mlp.linear_fc1.weight": "w1",
    "mlp.linear_fc1.bias": "b1",
    "mlp.linear_fc2.weight": "w2",
    "mlp.linear_fc2.bias": "b2",
}
"""Names of a block's feed-forward tensors -> names of the same tensors in an expert's first sublayer."""


def upcycle(dense: dict[str, Tensor], target: RunConfig, vocab_size: int) -> dict[str, Tensor]:
    """Weights and router buffers of ``target`` from a dense model's weights.

    Raises UserError if the experts cannot take the place of the feed-forward layers.
    """
    moe, replace = target.moe, target.moe.placement == "replace"
    scale = 1 / neutral_gate(moe) if replace else 1.0
    width = moe.ffn_hidden_size or target.model.ffn_hidden_size
    if replace and width != target.model.ffn_hidden_size:
        raise UserError(
            f"moe.ffn_hidden_size: got {width}: experts become copies of feed-forward layers "
            f"{target.model.ffn_hidden_size} wide; nearest that works: null"
        )
    weights = {name: value for name, value in dense.items() if not name.startswith("decoder.layers.")}
    for old, new, block in _stack(target):
        source = _below(dense, f"decoder.layers.{old}.")
        has_moe = block in moe.layers
        kept = {name: value for name, value in source.items() if not (has_moe and replace and name in COPIED)}
        weights |= {f"decoder.layers.{new}.{name}": value for name, value in kept.items()}
        if not has_moe:
            continue
        fresh = _fresh_layer(target, vocab_size, block, f"decoder.layers.{new + 1}.")
        if replace:
            copied = {COPIED[name]: value for name, value in source.items() if name in COPIED}
            for name in fresh:
                _, is_expert, rest = name.partition(".experts.")
                _, sublayer, leaf = rest.rpartition("sublayers.0.")
                if is_expert and sublayer:
                    fresh[name] = copied[leaf] * scale if leaf in ("w2", "b2") else copied[leaf].clone()
        weights |= fresh
    return weights


def neutral_gate(moe: MoEConfig) -> float:
    """The sum of a token's gates when all experts are equally good.

    Raises UserError for a router that gives tokens different numbers of experts.
    """
    if moe.facts.experts_choose:
        raise UserError(
            f"moe.router: got '{moe.router}': it serves some tokens several times and others never, so experts cannot "
            "take the place of a feed-forward layer; nearest that works: topk, or moe.placement after"
        )
    return moe.gate_facts.neutral(moe.top_k, moe.experts)


def _stack(target: RunConfig) -> Iterator[tuple[int, int, int]]:
    """Of each block: its index in the dense stack and in the target's, which counts MoE layers, and its number."""
    new = 0
    for old in range(target.model.layers):
        block = old + 1
        yield old, new, block
        new += 2 if block in target.moe.layers else 1


def _fresh_layer(run: RunConfig, vocab_size: int, block: int, prefix: str) -> dict[str, Tensor]:
    """The start values of an MoE layer, and its router's buffers, by canonical name."""
    layer = build_moe_layer(run, vocab_size, ALONE, block, run.moe.layers.index(block))
    shapes = {prefix + piece.name: piece.shape for piece in pieces(nn.ModuleDict({"moe": layer}), 1)}
    buffers = {f"{prefix}moe.router.{name}": value for name, value in layer.router.named_buffers()}
    return {name: start_value(name, shape, run) for name, shape in shapes.items()} | buffers


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
