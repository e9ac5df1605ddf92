"""Start values that follow from (seed, name of the whole tensor) alone.

A layout decides which rank holds what, never what it is: one process and sixty-four start from the same model.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.model.layout import pieces

_EXPERT_ID = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _start(name: str, shape: tuple[int, ...], run: RunConfig, generator: torch.Generator) -> Tensor:
    """Start value of a whole tensor; the rules of the authors' code where it has one (docs/method.md)."""
    m = run.model

    def normal(std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    def uniform(bound: float) -> Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) * bound

    leaf = name.rsplit(".", 1)[-1]
    is_norm = "norm" in name
    if leaf == "centroids":
        # Orthogonal rows of norm ``gain``; with more experts than dimensions torch makes the columns orthogonal.
        return nn.init.orthogonal_(torch.empty(shape), gain=run.moe.centroid_gain, generator=generator)
    if leaf == "scale_N":
        return torch.ones(shape)
    if leaf == "taps":
        return uniform(1 / math.sqrt(shape[0]))
    if is_norm:
        return torch.zeros(shape) if leaf.endswith("bias") else torch.ones(shape)
    if ".distilled." in name:
        if name.endswith("embedding.weight") and run.moe.distilled.kind != "transformer":
            return normal(1.0)
        return torch.zeros(shape) if len(shape) == 1 else normal(1 / math.sqrt(shape[-1]))
    if leaf in ("w2", "b1", "b2") or len(shape) == 1:  # W2 = 0: a fresh expert adds nothing. Other vectors are biases.
        return torch.zeros(shape)
    if leaf == "w1":
        return uniform(1 / math.sqrt(shape[-1]))
    if "embedding" in name:
        return normal(1 / math.sqrt(m.hidden_size) if m.embedding == "scaled" else m.init_std)
    if ".linear_proj." in name or ".linear_fc2." in name:
        return normal(m.init_std / math.sqrt(2 * m.layers))
    return normal(m.init_std)


def start_value(name: str, shape: tuple[int, ...], run: RunConfig) -> Tensor:
    """fp32 start value of a whole tensor, by its canonical name."""
    key = _EXPERT_ID.sub("*", name) if run.moe.equal_experts else name
    return _start(name, shape, run, _generator(run.seed, key))


@torch.no_grad()
def initialize_parameters(model: nn.Module, run: RunConfig) -> None:
    """Fill every parameter of ``model`` in place, whatever part of the whole it holds."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    for piece in pieces(model, ranks):
        whole = start_value(piece.name, piece.shape, run)
        piece.select(piece.parameter).copy_(piece.local_of(whole, rank, ranks))
