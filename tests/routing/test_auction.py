"""The auction against the exact solution of the assignment problem."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from stablemoe_ds.routing import auction
from stablemoe_ds.routing.auction import balanced_assignment


def optimum(scores_TN: Tensor) -> float:
    """Largest total affinity with at most ceil(T / N) tokens an expert: each expert as so many columns."""
    tokens, experts = scores_TN.shape
    slots = np.repeat(scores_TN.double().numpy(), math.ceil(tokens / experts), axis=1)
    rows, columns = linear_sum_assignment(slots, maximize=True)
    return float(slots[rows, columns].sum())


def kept(scores_TN: Tensor, expert_T: Tensor) -> float:
    return float(scores_TN.double().gather(1, expert_T[:, None]).sum())


def assert_even(expert_T: Tensor, tokens: int, experts: int) -> None:
    assert expert_T.shape == (tokens,)
    counts = torch.bincount(expert_T, minlength=experts)  # refuses a token without an expert
    assert len(counts) == experts
    assert int(counts.max()) <= math.ceil(tokens / experts)


def similar_rows(tokens: int, experts: int, kinds: int, seed: int = 0) -> Tensor:
    """Few kinds of tokens, the first ones far more common: what a batch of text looks like to a router."""
    random = np.random.default_rng(seed)
    kind_T = random.zipf(1.5, tokens) % kinds
    rows = random.normal(size=(kinds, experts))[kind_T] + 1e-3 * random.normal(size=(tokens, experts))
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(1, 3), (3, 5), (6, 6), (8, 4), (11, 3), (13, 7), (24, 4)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_exact_on_whole_numbers(shape: tuple[int, int], seed: int) -> None:
    """With T * epsilon below 1 nothing but the optimum is left."""
    scores = torch.tensor(np.random.default_rng(seed).integers(-4, 5, shape), dtype=torch.float32)
    expert_T = balanced_assignment(scores, epsilon=0.9 / shape[0])
    assert_even(expert_T, *shape)
    assert kept(scores, expert_T) == optimum(scores)


@pytest.mark.parametrize("shape", [(64, 8), (150, 4), (201, 16)], ids=str)
@pytest.mark.parametrize("kind", ["random", "similar rows", "far from zero"])
def test_within_epsilon_a_token_by_default(shape: tuple[int, int], kind: str) -> None:
    random = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    scores = {"random": random, "similar rows": similar_rows(*shape, 9), "far from zero": random - 1000}[kind]
    expert_T = balanced_assignment(scores)
    assert_even(expert_T, *shape)
    epsilon = float(scores.max() - scores.min()) / 50
    assert optimum(scores) - kept(scores, expert_T) <= shape[0] * epsilon


def test_better_than_a_quarter_of_its_bound_on_random_scores() -> None:
    scores = torch.randn(400, 8, generator=torch.Generator().manual_seed(6))
    gap = optimum(scores) - kept(scores, balanced_assignment(scores))
    assert gap <= 400 * float(scores.max() - scores.min()) / 50 / 4


@pytest.mark.parametrize(("tokens", "experts"), [(0, 4), (1, 1), (1, 64), (5, 1), (3, 64), (65, 64), (1000, 7)])
@pytest.mark.parametrize("kind", ["equal", "one row", "two rows", "one favourite"])
def test_ties_end_in_an_even_assignment(tokens: int, experts: int, kind: str) -> None:
    random = torch.Generator().manual_seed(7)
    rows = torch.randn(2, experts, generator=random)
    favourite = torch.zeros(tokens, experts)
    favourite[:, 0] = 10
    scores = {
        "equal": torch.full((tokens, experts), 3.0),
        "one row": rows[:1].repeat(tokens, 1),
        "two rows": rows[torch.randint(2, (tokens,), generator=random)],
        "one favourite": favourite,
    }[kind]
    assert_even(balanced_assignment(scores), tokens, experts)


def test_the_same_scores_get_the_same_assignment() -> None:
    scores = similar_rows(300, 8, 5)
    assert torch.equal(balanced_assignment(scores), balanced_assignment(scores.clone()))


def test_a_large_batch_of_similar_tokens_ends() -> None:
    """4096 tokens of a Zipf law: hundreds of rounds, far from the limit."""
    assert_even(balanced_assignment(similar_rows(4096, 32, 50)), 4096, 32)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    scores = torch.zeros(4, 2)
    scores[1, 1] = bad
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        balanced_assignment(scores)


def test_an_auction_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six tokens fight for the four places that are worth anything, in small steps."""
    monkeypatch.setattr(auction, "LIMIT", 30)
    scores = torch.tensor([[100.0, 100.0, 0.0]] * 6)
    with pytest.raises(RuntimeError, match="did not end in 30 rounds"):
        balanced_assignment(scores, epsilon=0.1)
    assert_even(balanced_assignment(scores, epsilon=20), 6, 3)
