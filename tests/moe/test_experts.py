"""A rank's experts against one token at a time through plain functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stablemoe_ds.moe.expert_offsets import ExpertOffsets
from stablemoe_ds.moe.experts import Experts, ExpertShape

D, FFN = 8, 12
SHAPES = {
    "paper": ExpertShape(D, FFN, 3, "relu", "layernorm", 1e-5, True),
    "modern": ExpertShape(D, FFN, 1, "swiglu", "rmsnorm", 1e-5, False),
    "modern, 2 sublayers, bias": ExpertShape(D, FFN, 2, "swiglu", "rmsnorm", 1e-3, True),
    "gelu": ExpertShape(D, FFN, 1, "gelu", "layernorm", 1e-5, False),
}
SPLITS = [3, 0, 4]


@pytest.fixture(params=SHAPES)
def experts(request) -> Experts:
    torch.manual_seed(1)
    made = Experts(SHAPES[request.param], len(SPLITS))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.double()


def slow_stack(experts: Experts, expert: int, x_D: Tensor) -> Tensor:
    """The stack of one expert on one token, from ``torch.nn.functional`` alone."""
    for sublayer in experts.sublayers:
        shape, w = sublayer.shape, {name: p[expert] for name, p in sublayer.named_parameters()}
        if shape.norm == "layernorm":
            normed = F.layer_norm(x_D, (D,), w["norm_weight"], w["norm_bias"], shape.norm_epsilon)
        else:
            normed = F.rms_norm(x_D, (D,), w["norm_weight"], shape.norm_epsilon)
        inner = F.linear(normed, w["w1"], w.get("b1"))
        if shape.activation == "swiglu":
            inner = F.silu(inner[:FFN]) * inner[FFN:]
        else:
            inner = {"relu": F.relu, "gelu": F.gelu}[shape.activation](inner)
        x_D = x_D + F.linear(inner, w["w2"], w.get("b2"))
    return x_D


def rows() -> Tensor:
    return torch.randn(sum(SPLITS), D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_each_row_gets_what_its_expert_adds(experts):
    results = []
    owner = [e for e, count in enumerate(SPLITS) for _ in range(count)]
    for slow in (False, True):
        x_RD = rows().requires_grad_()
        experts.zero_grad()
        if slow:
            added = torch.stack([slow_stack(experts, e, row) - row for e, row in zip(owner, x_RD, strict=True)])
        else:
            added = experts(x_RD, ExpertOffsets.of(SPLITS))
        (added * torch.linspace(-1, 1, D, dtype=torch.float64)).sum().backward()
        results.append([added.detach(), x_RD.grad, *(p.grad.clone() for p in experts.parameters())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)
    assert all(not p.grad[1].any() for p in experts.parameters()), "the second expert is idle"


def test_no_rows_at_all(experts):
    x_RD = rows()[:0].requires_grad_()
    added = experts(x_RD, ExpertOffsets.of([0, 0, 0]))
    assert added.shape == (0, D)
    added.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_fresh_experts_add_nothing(name):
    """W2 = 0, b2 = 0: whatever W1 is, a fresh expert is the identity (docs/method.md)."""
    fresh = Experts(SHAPES[name], len(SPLITS))
    for sublayer in fresh.sublayers:
        torch.nn.init.normal_(sublayer.w1)
    assert not fresh(rows().float(), ExpertOffsets.of(SPLITS)).any()
