"""Balance and distillation losses against the paper's equations, one token at a time in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from stablemoe_ds.routing.losses import balance_sum, count_tokens, distillation_sum

N = 5


def routed(tokens: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """Distinct experts for every token; every fourth token is padding and goes nowhere."""
    random = torch.Generator().manual_seed(seed)
    expert_TK = torch.stack([torch.randperm(N, generator=random)[:top_k] for _ in range(tokens)])
    expert_TK[3::4] = -1
    return expert_TK


def alone(counts: torch.Tensor) -> torch.Tensor:
    return counts


@pytest.mark.parametrize("top_k", [1, 2])
def test_counts_are_a_count(top_k):
    expert_TK = routed(30, top_k)
    wanted = [sum(row.count(i) for row in expert_TK.tolist()) for i in range(N)]
    assert count_tokens(expert_TK, N).tolist() == wanted
    assert count_tokens(expert_TK[:0], N).tolist() == [0] * N


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("others", [[0] * N, [7, 0, 1, 12, 3]], ids=["one rank", "more ranks"])
def test_balance_is_equation_8_and_its_gradient_the_closed_form(top_k, others):
    """L = sum_i (n_i - nbar)/nbar * sum over its tokens of sigma; dL/ds = (n_a/nbar - 1) * sigma * (1 - sigma)."""
    expert_TK = routed(30, top_k)
    scores_TN = torch.randn(30, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    gate_TK = torch.sigmoid(scores_TN.gather(1, expert_TK.clamp_min(0)))
    elsewhere = torch.tensor(others, dtype=torch.float32)
    loss = balance_sum(expert_TK, gate_TK, count_tokens(expert_TK, N), lambda counts: counts + elsewhere)
    loss.backward()

    chosen, scores = expert_TK.tolist(), scores_TN.tolist()
    n = [others[i] + sum(row.count(i) for row in chosen) for i in range(N)]
    mean = sum(n) / N
    wanted, gradient = 0.0, [[0.0] * N for _ in chosen]
    for t, row in enumerate(chosen):
        for a in row:
            if a >= 0:
                sigma = 1 / (1 + math.exp(-scores[t][a]))
                wanted += (n[a] - mean) / mean * sigma
                gradient[t][a] += (n[a] / mean - 1) * sigma * (1 - sigma)
    assert float(loss) == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(scores_TN.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    assert scores_TN.grad.abs().sum() > 0.1


def test_balance_of_an_even_load_is_zero_and_pushes_nobody():
    gate_TK = torch.rand(20, 1, requires_grad=True)
    expert_TK = torch.arange(20)[:, None] % N
    loss = balance_sum(expert_TK, gate_TK, count_tokens(expert_TK, N), alone)
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert gate_TK.grad.abs().max() < 1e-6


def test_without_a_token_both_losses_are_zero():
    expert_TK = torch.full((4, 1), -1)
    gate_TK, logits_TN = torch.rand(4, 1, requires_grad=True), torch.randn(4, N, requires_grad=True)
    loss = balance_sum(expert_TK, gate_TK, count_tokens(expert_TK, N), alone) + distillation_sum(logits_TN, expert_TK)
    loss.backward()
    assert float(loss) == 0
    assert not gate_TK.grad.any()
    assert not logits_TN.grad.any()


@pytest.mark.parametrize("top_k", [1, 2])
def test_distillation_is_cross_entropy_of_routed_tokens(top_k):
    expert_TK = routed(30, top_k)
    logits_TN = torch.randn(30, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    loss = distillation_sum(logits_TN, expert_TK)
    loss.backward()

    wanted, gradient = 0.0, torch.zeros(30, N, dtype=torch.float64)
    for t, (row, logits) in enumerate(zip(expert_TK.tolist(), logits_TN.tolist(), strict=True)):
        total = sum(math.exp(x) for x in logits)
        for a in row:
            if a >= 0:
                wanted -= math.log(math.exp(logits[a]) / total) / top_k
                for i in range(N):
                    gradient[t, i] += (math.exp(logits[i]) / total - (i == a)) / top_k
    assert float(loss) == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(logits_TN.grad, gradient)
