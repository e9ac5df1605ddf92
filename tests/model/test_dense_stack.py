"""What stands in the place of an MoE layer in dense models of as many parameters."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from stablemoe_ds.config.costs import flops_per_token, parameters
from stablemoe_ds.data.batch import Batch
from tests.tiny import VOCAB, tiny_run

PAPER = {"norm": "layernorm", "activation": "relu", "bias": True}
N = 4


def stack_of(model):
    """The first DenseStack of a model."""
    from stablemoe_ds.model.blocks import DenseStack

    return next(module for module in model.modules() if isinstance(module, DenseStack))


def some_batch() -> Batch:
    ids_BS = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    every = torch.ones(2, 16, dtype=torch.bool)
    return Batch(ids_BS, ids_BS.roll(-1, 1), every, every)


@pytest.mark.parametrize(("router", "width", "depth"), [("dense_deeper", 64, 2 * N), ("dense_wider", 64 * N, 2)])
def test_stack_is_residual_sublayers_one_after_the_other(router, width, depth, build):
    """x + W2 relu(W1 norm(x) + b1) + b2, ``depth`` times, for every token and without a gate."""
    stack = stack_of(build(model=PAPER, moe={"router": router, "sublayers": 2, "experts": N}))
    hidden_SBD = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(2))
    weights: dict[str, Tensor] = {name: p[0].double() for name, p in stack.stack.named_parameters()}
    x = hidden_SBD.double()
    for layer in range(depth):
        w1, b1, w2, b2, scale, shift = (
            weights[f"sublayers.{layer}.{leaf}"] for leaf in ("w1", "b1", "w2", "b2", "norm_weight", "norm_bias")
        )
        assert w1.shape == (width, 32)
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale + shift
        x = x + (normed @ w1.T + b1).relu() @ w2.T + b2
    assert f"sublayers.{depth}.w1" not in weights
    torch.testing.assert_close(stack(hidden_SBD).double(), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", ["dense_deeper", "dense_wider"])
def test_a_fresh_stack_adds_nothing(router, fresh):
    stack = stack_of(fresh(moe={"router": router}))
    hidden_SBD = torch.randn(3, 2, 32)
    assert torch.equal(stack(hidden_SBD), hidden_SBD)


@pytest.mark.parametrize("router", ["dense_deeper", "dense_wider"])
def test_recomputation_changes_no_gradient(router, build):
    gradients = []
    for recompute in (False, True):
        model = build(moe={"router": router}, parallel={"recompute": recompute}).train()
        output = model(some_batch())
        assert output.layers == []
        output.loss_sum.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert all(g is not None and g.any() for name, g in gradients[-1].items() if ".stack." in name)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("sublayers", [1, 3])
@pytest.mark.parametrize("shape", [{}, PAPER], ids=["modern", "paper"])
def test_parameters_are_those_of_all_experts(shape, sublayers):
    """Deeper: to the last number. Wider: but for one norm (and output bias) a sublayer instead of one an expert."""
    moe = {"layers": [2], "experts": N, "sublayers": sublayers}
    sparse = parameters(tiny_run(model=shape, moe=moe))
    deeper, wider = (
        parameters(tiny_run(model=shape, moe={**moe, "router": name})) for name in ("dense_deeper", "dense_wider")
    )
    per_expert = 32 * (3 if shape else 1)
    assert deeper.shared_experts == sparse.expert
    assert wider.shared_experts == sparse.expert - sublayers * (N - 1) * per_expert
    for dense in (deeper, wider):
        assert dense.active == dense.total == dense.shared
        backbone = {"shared_experts", "expert", "router", "distilled", "served"}
        assert {k: v for k, v in asdict(dense).items() if k not in backbone} == {
            k: v for k, v in asdict(sparse).items() if k not in backbone
        }


def test_both_cost_the_products_of_all_experts():
    moe = {"layers": [2], "experts": N, "sublayers": 2}
    sparse, deeper, wider = (
        flops_per_token(tiny_run(moe={**moe, "router": name})) for name in ("switch", "dense_deeper", "dense_wider")
    )
    one_expert = 6 * 2 * 3 * 32 * 64
    assert deeper == wider == sparse + (N - 1) * one_expert
