"""Dispatch plans: who goes where, and back, checked by properties over random routes."""

from __future__ import annotations

import pytest
import torch

from stablemoe_ds.moe.dispatch import combine, return_tokens, send_tokens
from stablemoe_ds.moe.expert_offsets import owners
from stablemoe_ds.moe.plan import inverse, plan_dispatch

CASES = [
    (seed, tokens, experts, top_k)
    for seed in range(8)
    for tokens, experts, top_k in [(0, 3, 1), (1, 4, 2), (40, 5, 1), (40, 8, 3)]
]


def routes(seed: int, tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """Some seeds with padding, one with nothing but padding, one where a single expert takes all."""
    random = torch.Generator().manual_seed(seed)
    expert_TK = torch.rand(tokens, experts, generator=random).argsort(1)[:, :top_k]
    if seed == 6:
        expert_TK = torch.arange(experts - top_k, experts).expand(tokens, top_k).clone()
    expert_TK[torch.rand(tokens, generator=random) < {3: 0.5, 4: 0.9, 5: 1.0}.get(seed, 0.0)] = -1
    return expert_TK


@pytest.mark.parametrize(("seed", "tokens", "experts", "top_k"), CASES)
def test_plan_of_a_single_rank(seed, tokens, experts, top_k):
    expert_TK = routes(seed, tokens, experts, top_k)
    (plan,) = plan_dispatch(expert_TK, experts, None)
    pairs = [(e, t, k) for t, row in enumerate(expert_TK.tolist()) for k, e in enumerate(row) if e >= 0]
    assert plan.order_A.tolist() == [t * top_k + k for _, t, k in sorted(pairs)]
    assert plan.offsets.sizes == [sum(e == i for e, _, _ in pairs) for i in range(experts)]
    assert plan.send_splits == plan.recv_splits == [len(pairs)]
    assert plan.group_total == len(pairs)
    assert plan.arrival_R is None


@pytest.mark.parametrize(("seed", "tokens", "experts", "top_k"), CASES)
def test_sent_rows_stand_with_their_expert_and_come_back_weighted(seed, tokens, experts, top_k):
    expert_TK = routes(seed, tokens, experts, top_k)
    (plan,) = plan_dispatch(expert_TK, experts, None)
    hidden_TD = torch.randn(tokens, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gate_TK = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(seed))
    rows_RD = send_tokens(hidden_TD, plan, None).wait()
    owner = owners(plan.offsets.ends_E, sum(plan.offsets.sizes))
    back_AD = return_tokens(rows_RD * (owner[:, None] + 1), plan, None).wait()  # expert e multiplies by e + 1
    got = combine(back_AD, gate_TK, plan)
    wanted = torch.zeros_like(hidden_TD)
    for t in range(tokens):
        for k, e in enumerate(expert_TK[t].tolist()):
            if e >= 0:
                wanted[t] += gate_TK[t, k].double() * (e + 1) * hidden_TD[t]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("seed", "tokens", "experts", "top_k"), CASES)
def test_gradients_of_sending_and_combining_are_those_of_indexing(seed, tokens, experts, top_k):
    expert_TK = routes(seed, tokens, experts, top_k)
    (plan,) = plan_dispatch(expert_TK, experts, None)
    random = torch.Generator().manual_seed(seed)
    made = [torch.randn(tokens, 3, dtype=torch.float64, generator=random), torch.rand(tokens, top_k, generator=random)]
    sides = []
    for slow in (False, True):
        hidden_TD, gate_TK = (tensor.clone().requires_grad_() for tensor in made)
        if slow:
            rows_AD = hidden_TD[plan.order_A // top_k].sin()
            weighted_AD = rows_AD * gate_TK.view(-1)[plan.order_A].double()[:, None]
            out_TD = torch.zeros_like(hidden_TD).index_add(0, plan.order_A // top_k, weighted_AD)
        else:
            out_TD = combine(send_tokens(hidden_TD, plan, None).wait().sin(), gate_TK, plan)
        (out_TD * torch.arange(1.0, 4)).sum().backward()
        sides.append((out_TD, hidden_TD.grad, gate_TK.grad))
    for got, wanted in zip(*sides, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_are_planned_like_batches_of_their_own(parts):
    expert_TK = routes(3, 40, 5, 2)
    for plan, part_TK in zip(plan_dispatch(expert_TK, 5, None, parts), expert_TK.tensor_split(parts), strict=True):
        (alone,) = plan_dispatch(part_TK, 5, None)
        assert torch.equal(plan.order_A, alone.order_A)
        assert torch.equal(plan.position_TK, alone.position_TK)
        assert plan.offsets.sizes == alone.offsets.sizes


@pytest.mark.parametrize("size", [0, 1, 9])
def test_inverse_permutation(size):
    order = torch.randperm(size)
    assert torch.equal(order[inverse(order)], torch.arange(size))
    assert torch.equal(inverse(order)[order], torch.arange(size))
