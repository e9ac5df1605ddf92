"""Grouped products against one plain product an expert, forward and backward, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stablemoe_ds.moe.grouped import grouped_linear, grouped_scale

SPLITS = {
    "even": [2, 2, 2],
    "uneven": [1, 4, 2],
    "an idle expert": [3, 0, 2],
    "idle ends": [0, 5, 0],
    "no rows": [0, 0, 0],
    "one expert": [4],
}
IN, OUT = 3, 4


def leaf(*shape: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()


def linear_loop(x: Tensor, w: Tensor, b: Tensor | None, splits: list[int]) -> Tensor:
    rows = x.split(splits)
    return torch.cat([rows[e] @ w[e].T + (0 if b is None else b[e]) for e in range(len(splits))])


def scale_loop(x: Tensor, w: Tensor, b: Tensor | None, splits: list[int]) -> Tensor:
    rows = x.split(splits)
    return torch.cat([rows[e] * w[e] + (0 if b is None else b[e]) for e in range(len(splits))])


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("fast", "slow", "shape"),
    [(grouped_linear, linear_loop, (OUT, IN)), (grouped_scale, scale_loop, (IN,))],
    ids=["linear", "scale"],
)
class TestGrouped:
    def inputs(self, splits: list[int], bias: bool, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
        experts = len(splits)
        x, w = leaf(sum(splits), IN, seed=1), leaf(experts, *shape, seed=2)
        return x, w, leaf(experts, shape[0], seed=3) if bias else None

    def test_equals_a_loop(
        self,
        fast: Callable[..., Tensor],
        slow: Callable[..., Tensor],
        shape: tuple[int, ...],
        bias: bool,
        splits: list[int],
    ) -> None:
        sides = []
        for function in (fast, slow):
            x, w, b = self.inputs(splits, bias, shape)
            out = function(x, w, b, splits)
            # Uneven and not contiguous, as gradients that come from a slice or a transpose are.
            upstream = torch.arange(2.0 * out.numel(), dtype=torch.float64).view(-1, 2)[:, 0].view(out.shape).sin()
            (out * upstream).sum().backward()
            sides.append((out, x.grad, *(p.grad for p in (w, b) if p is not None)))
        for got, wanted in zip(*sides, strict=True):
            torch.testing.assert_close(got, wanted)

    def test_gradcheck(
        self,
        fast: Callable[..., Tensor],
        slow: Callable[..., Tensor],
        shape: tuple[int, ...],
        bias: bool,
        splits: list[int],
    ) -> None:
        if sum(splits) == 0:
            x, w, b = self.inputs(splits, bias, shape)
            fast(x, w, b, splits).sum().backward()
            assert all(p.grad is not None and not p.grad.any() for p in (w, b) if p is not None)
        else:
            assert torch.autograd.gradcheck(lambda *args: fast(*args, splits), self.inputs(splits, bias, shape))


def test_an_idle_expert_gets_a_gradient_of_zero():
    """A gradient on every rank in every step: ZeRO waits for ever for one that never comes."""
    x, w, b = leaf(3, IN, seed=1), leaf(2, OUT, IN, seed=2), leaf(2, OUT, seed=3)
    grouped_linear(x, w, b, [3, 0]).sum().backward()
    assert not w.grad[1].any()
    assert not b.grad[1].any()
    assert w.grad[0].any()


def test_input_without_gradient():
    x, w = leaf(3, IN, seed=1).detach(), leaf(2, OUT, IN, seed=2)
    grouped_linear(x, w, None, [1, 2]).sum().backward()
    torch.testing.assert_close(w.grad[0], x[:1].sum(0).expand(OUT, IN))


def test_bf16_rows_are_the_product_of_their_expert():
    x, w, b = (t.detach().bfloat16() for t in (leaf(6, IN, seed=1), leaf(3, OUT, IN, seed=2), leaf(3, OUT, seed=3)))
    got = grouped_linear(x, w, b, [1, 3, 2])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(
        got.double(), linear_loop(x.double(), w.double(), b.double(), [1, 3, 2]), rtol=2e-2, atol=2e-2
    )
