"""Start values that follow from (seed, name of the whole tensor) alone.

A layout decides which rank holds what, never what it is: one process and sixty-four start from the same model.

Centroids, distilled routers, norms and the matrices of experts start as in the authors' code whatever ``model.init``
says; that chooses the rules of the backbone's matrices and of all biases:

- ``megatron``: matrices N(0, init_std), those that write to the residual stream divided by sqrt(2 * layers); biases 0.
- ``fairseq``: those of the authors' code, which stands on fairseq. q, k, v: Xavier-uniform with gain 1/sqrt(2); output
  of attention: Xavier-uniform with gain 1, its bias 0; all other matrices and biases: U(-1, 1) / sqrt(inputs), as
  torch's ``nn.Linear`` starts.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from stablemoe_ds.config.costs import shared_stack
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.model.layout import Piece, pieces

_EXPERT_ID = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _uniform(shape: tuple[int, ...], bound: float | Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def _start(name: str, shape: tuple[int, ...], run: RunConfig, generator: torch.Generator) -> Tensor:
    """Start value of a whole tensor."""
    m = run.model

    def normal(std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    leaf = name.rsplit(".", 1)[-1]
    if leaf == "centroids":
        # Orthogonal rows of norm ``gain``; with more experts than dimensions torch makes the columns orthogonal.
        return nn.init.orthogonal_(torch.empty(shape), gain=run.moe.centroid_gain, generator=generator)
    if leaf == "scale_N":
        return torch.ones(shape)
    if leaf == "taps":
        return _uniform(shape, 1 / math.sqrt(shape[0]), generator)
    if "norm" in name:
        return torch.zeros(shape) if leaf.endswith("bias") else torch.ones(shape)
    if ".distilled." in name:
        if name.endswith("embedding.weight") and run.moe.distilled.kind != "transformer":
            return normal(1.0)
        return torch.zeros(shape) if len(shape) == 1 else normal(1 / math.sqrt(shape[-1]))
    if leaf == "w2":  # a fresh expert adds nothing, or nothing but its bias
        return torch.zeros(shape)
    if leaf == "w1":
        return _uniform(shape, 1 / math.sqrt(shape[-1]), generator)
    if "embedding" in name:
        return normal(1 / math.sqrt(m.hidden_size) if m.embedding == "scaled" else m.init_std)
    if m.init == "fairseq":
        if name.startswith("output_layer."):
            return normal(1 / math.sqrt(m.hidden_size))
        return _uniform(shape, _fairseq_bound(name, shape, run), generator)
    if leaf in ("b1", "b2") or len(shape) == 1:
        return torch.zeros(shape)
    into_stream = ".linear_proj." in name or ".linear_fc2." in name
    return normal(m.init_std / math.sqrt(2 * m.layers) if into_stream else m.init_std)


def _fairseq_bound(name: str, shape: tuple[int, ...], run: RunConfig) -> float | Tensor:
    """Largest absolute start value, for a fused matrix of each row: what fairseq has for the matrices by themselves."""
    m, leaf = run.model, name.rsplit(".", 1)[-1]
    if name.endswith(".linear_proj.bias"):
        return 0.0
    if leaf == "b2":
        own = run.moe.ffn_hidden_size or m.ffn_hidden_size
        return 1 / math.sqrt(own if ".experts." in name else shared_stack(run)[0])
    if name.endswith(".linear_fc2.bias"):
        return 1 / math.sqrt(m.ffn_hidden_size)
    if leaf in ("b1", "bias"):
        return 1 / math.sqrt(m.hidden_size)
    if name.endswith(".linear_proj.weight"):
        return _xavier(*shape)
    if name.endswith(".linear_qkv.weight"):
        # Rows stand by group of key and value heads: queries of the group, its key, its value.
        width, groups = m.hidden_size // m.heads, m.kv_heads or m.heads
        query = torch.full((m.heads // groups * width,), _xavier(m.hidden_size, m.hidden_size))
        key_value = torch.full((2 * width,), _xavier(groups * width, m.hidden_size))
        return torch.cat([query, key_value]).repeat(groups)[:, None] / math.sqrt(2)
    return 1 / math.sqrt(shape[-1])


def _xavier(outputs: int, inputs: int) -> float:
    return math.sqrt(6 / (outputs + inputs))


def start_value(name: str, shape: tuple[int, ...], run: RunConfig) -> Tensor:
    """fp32 start value of a whole tensor, by its canonical name."""
    key = _EXPERT_ID.sub("*", name) if run.moe.equal_experts else name
    return _start(name, shape, run, _generator(run.seed, key))


def initialize_parameters(model: nn.Module, run: RunConfig) -> None:
    """Fill every parameter of ``model`` in place, whatever part of the whole it holds; not those without memory."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    initialize_pieces((piece for piece in pieces(model, ranks) if not piece.parameter.is_meta), run)


@torch.no_grad()
def initialize_pieces(held: Iterable[Piece], run: RunConfig) -> None:
    """Give the parameters that these pieces are part of their start values, and memory if they have none."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    for piece in held:
        if piece.parameter.is_meta:
            give_memory(piece.parameter)
        whole = start_value(piece.name, piece.shape, run)
        piece.select(piece.parameter).copy_(piece.local_of(whole, rank, ranks))


@contextmanager
def without_memory() -> Iterator[None]:
    """Parameters of modules built meanwhile have a shape but no memory (device ``meta``). Buffers are as usual."""

    def release(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter:
        released = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        vars(released).update(vars(parameter))
        return released

    hook = register_module_parameter_registration_hook(release)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def give_memory(parameter: nn.Parameter) -> None:
    """Zeros, as they stay at places without an expert. In place: others refer to it, and libraries have marked it."""
    marks = dict(vars(parameter))
    torch.utils.swap_tensors(parameter, nn.Parameter(torch.zeros(parameter.shape), parameter.requires_grad))
    vars(parameter).update(marks)
