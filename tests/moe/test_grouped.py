"""Sublayers of all experts, by either way, against one plain expression an expert; sums over offsets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stablemoe_ds.moe.expert_offsets import ExpertOffsets, owners
from stablemoe_ds.moe.grouped import can_group, has_grouped_kernel, serve_grouped, sums_by_expert
from stablemoe_ds.moe.loop import serve_in_a_loop
from stablemoe_ds.moe.sublayer import SublayerWeights

SIZES = {
    "even": [2, 2, 2],
    "uneven": [1, 4, 2],
    "an idle expert": [3, 0, 2],
    "idle ends": [0, 5, 0],
    "one expert": [4],
}
D, INNER = 8, 16
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swiglu": lambda inner: F.silu(inner[:, : inner.shape[1] // 2]) * inner[:, inner.shape[1] // 2 :],
}


def inputs(sizes: list[int], activation: str, bias: bool, dtype: torch.dtype) -> list[Tensor | None]:
    """Rows, scale, shift, W1, b1, W2, b2 as leaves, of numbers that every dtype can hold."""
    random, experts = torch.Generator().manual_seed(1), len(sizes)
    outer = 2 * INNER if activation == "swiglu" else INNER
    shapes = [(sum(sizes), D), (experts, D), (experts, D), (experts, outer, D), (experts, outer)]
    shapes += [(experts, D, INNER), (experts, D)]
    made = [torch.randn(s, generator=random).bfloat16().to(dtype).requires_grad_() for s in shapes]
    return made if bias else [None if i in (2, 4, 6) else tensor for i, tensor in enumerate(made)]


def plain(x: Tensor, weights: SublayerWeights, activation: str, offsets: ExpertOffsets) -> Tensor:
    parts, (scale, shift, w1, b1, w2, b2) = [], weights
    for e, rows in enumerate(x.split(list(offsets.sizes))):
        scaled = rows * scale[e] + (0 if shift is None else shift[e])
        inner = ACTIVATIONS[activation](scaled @ w1[e].T + (0 if b1 is None else b1[e]))
        parts.append(inner @ w2[e].T + (0 if b2 is None else b2[e]))
    return torch.cat(parts)


def grouped(x: Tensor, weights: SublayerWeights, activation: str, offsets: ExpertOffsets) -> Tensor:
    return serve_grouped(x, weights, activation, offsets.ends_E)


def outcome(serve: Callable[..., Tensor], sizes: list[int], activation: str, bias: bool, dtype: torch.dtype):
    """What comes out, and every gradient."""
    made = inputs(sizes, activation, bias, dtype)
    out = serve(made[0], SublayerWeights(*made[1:]), activation, ExpertOffsets.of(sizes))
    # Uneven and not contiguous, as gradients that come from a slice or a transpose are.
    upstream = torch.arange(2.0 * out.numel(), dtype=torch.float64).view(-1, 2)[:, 0].view(out.shape).sin()
    (out * upstream.to(dtype)).sum().backward()
    return [out, *(tensor.grad for tensor in made if tensor is not None)]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("serve", "dtype", "close"),
    [
        (serve_in_a_loop, torch.float64, 1e-12),
        (grouped, torch.float32, 1e-5),
        (grouped, torch.bfloat16, 5e-2),
        (serve_in_a_loop, torch.bfloat16, 5e-2),
    ],
    ids=["loop fp64", "grouped fp32", "grouped bf16", "loop bf16"],
)
def test_outputs_and_gradients_are_those_of_plain_experts(serve, dtype, close, activation, bias, sizes):
    pairs = zip(
        outcome(serve, sizes, activation, bias, dtype),
        outcome(plain, sizes, activation, bias, torch.float64),
        strict=True,
    )
    for got, wanted in pairs:
        assert got.dtype == dtype
        assert (got.double() - wanted).norm() <= close * wanted.norm()


def test_an_idle_expert_gets_a_gradient_of_zero():
    """A gradient on every rank in every step: ZeRO waits for ever for one that never comes."""
    for serve in (serve_in_a_loop, grouped):
        made = inputs([3, 0], "relu", True, torch.float32)
        serve(made[0], SublayerWeights(*made[1:]), "relu", ExpertOffsets.of([3, 0])).sum().backward()
        assert all(not tensor.grad[1].any() for tensor in made[1:])
        assert made[5].grad[0].any()


def test_no_rows_at_all():
    made = inputs([0, 0], "gelu", True, torch.float32)
    serve_in_a_loop(made[0], SublayerWeights(*made[1:]), "gelu", ExpertOffsets.of([0, 0])).sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in made)


def test_grouping_is_for_the_gpu():
    made = inputs([2, 2], "relu", True, torch.bfloat16)
    assert not can_group(made[0], made[3])


@pytest.mark.parametrize(
    ("capability", "has"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)]
)
def test_grouping_is_for_hopper(capability, has):
    """Blackwell's kernel leaves rubbish in the gradients of experts without rows."""
    assert has_grouped_kernel(capability) is has


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_segments(sizes):
    offsets = ExpertOffsets.of(sizes)
    owner = [e for e, size in enumerate(sizes) for _ in range(size)]
    assert owners(offsets.ends_E, sum(sizes)).tolist() == owner
    rows = torch.randn(sum(sizes), 16)
    assert [e for e, (part, _) in enumerate(offsets.split(rows, rows)) for _ in part] == owner
    wanted = torch.stack([part.sum(0) for part in rows.split(sizes)])
    torch.testing.assert_close(sums_by_expert(rows, offsets.ends_E), wanted)
