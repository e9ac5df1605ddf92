"""The balanced table against the exact optimum of its integer program, and its load limit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from stablemoe_ds.routing.distilled import DistilledRouter
from stablemoe_ds.routing.fixed import TableRouting, freeze, freeze_balanced
from stablemoe_ds.tables.balanced_choice import balanced_choice
from stablemoe_ds.tables.table import least_load

Scores = NDArray[np.float64]
Counts = NDArray[np.int64]


def problem(seed: int, vocab: int, experts: int, exponent: float = 1.0) -> tuple[Scores, Counts]:
    """Log-probabilities with favourite experts, and token counts by a Zipf law, above 0."""
    random = np.random.default_rng(seed)
    logits = 2 * random.normal(size=(vocab, experts)) + random.normal(size=experts)
    counts = (1e5 / np.arange(1, vocab + 1) ** exponent).astype(np.int64) + 1
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), random.permutation(counts)


def kept(scores: Scores, counts: Counts, choice: NDArray[np.int32]) -> float:
    """Mean log-probability of a token's expert."""
    return float((counts * scores[np.arange(len(counts)), choice]).sum() / counts.sum())


def load(counts: Counts, choice: NDArray[np.int32], experts: int) -> float:
    return float(np.bincount(choice, weights=counts, minlength=experts).max() * experts / counts.sum())


def optimum(scores: Scores, counts: Counts, max_load: float) -> float:
    """The best there is, by branch and bound to one part in ten thousand."""
    vocab, experts = scores.shape
    once = np.kron(np.eye(vocab), np.ones(experts))
    filled = np.kron(counts / counts.sum(), np.eye(experts))
    rules = [LinearConstraint(once, 1, 1), LinearConstraint(filled, 0, max_load / experts)]
    cost = -(counts[:, None] * scores / counts.sum()).reshape(-1)
    options = {"time_limit": 20, "mip_rel_gap": 1e-4}
    solution = milp(cost, constraints=rules, integrality=np.ones(cost.size), bounds=Bounds(0, 1), options=options)
    return float(-solution.fun)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("exponent", [0.5, 1.0], ids=["light ids", "heavy ids"])
def test_within_a_hundredth_of_the_exact_optimum(seed: int, exponent: float) -> None:
    """In nats a token, where the best choice of each id breaks the limit."""
    scores, counts = problem(seed, 120, 4, exponent)
    limit = max(1.1, least_load(counts, 4, 1))
    choice = balanced_choice(scores, counts, limit)
    assert load(counts, choice, 4) <= limit
    assert load(counts, scores.argmax(1), 4) > limit
    best = optimum(scores, counts, limit)
    assert best - 0.01 <= kept(scores, counts, choice) <= best + 1e-3


@pytest.mark.parametrize("max_load", [1.02, 1.1, 1.5])
@pytest.mark.parametrize(("vocab", "experts"), [(500, 4), (3000, 16)])
def test_the_limit_is_kept_where_it_can_be(vocab: int, experts: int, max_load: float) -> None:
    for seed in range(3):
        scores, counts = problem(seed, vocab, experts, exponent=0.8)
        limit = max(max_load, least_load(counts, experts, 1))
        assert load(counts, balanced_choice(scores, counts, limit), experts) <= limit


def test_a_looser_limit_keeps_more_until_nothing_moves() -> None:
    scores, counts = problem(0, 800, 8, exponent=0.7)
    best = scores.argmax(1)
    own = load(counts, best, 8)
    values = [kept(scores, counts, balanced_choice(scores, counts, limit)) for limit in (1.01, 1.2, own * 1.01)]
    assert values == sorted(values)
    assert np.array_equal(balanced_choice(scores, counts, own * 1.01), best)


def test_an_id_that_fits_nowhere_leaves_the_other_experts_to_the_rest() -> None:
    scores, counts = problem(1, 200, 4)
    counts[17] = 4 * counts.sum()
    choice = balanced_choice(scores, counts, 1.1)
    assert load(counts, choice, 4) == pytest.approx(least_load(counts, 4, 1))
    others = np.bincount(np.delete(choice, 17), weights=np.delete(counts, 17), minlength=4)
    assert others[choice[17]] == 0


def test_ids_that_do_not_occur_keep_their_best_expert() -> None:
    scores, counts = problem(2, 300, 4)
    counts[::3] = 0
    choice = balanced_choice(scores, counts, 1.05)
    assert np.array_equal(choice[::3], scores[::3].argmax(1))
    assert np.array_equal(balanced_choice(scores, np.zeros(300, np.int64), 1.05), scores.argmax(1))


def test_a_frozen_table_keeps_the_limit_in_every_layer() -> None:
    routers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        router = DistilledRouter("word", 500, 4, dim=8, layers=1, width=8, heads=2, positions=4)
        with torch.no_grad():
            router.centroids.copy_(torch.randn(4, 8))
            router.features.embedding.weight += router.centroids[seed] / 3  # a favourite expert
        routers.append(router)
    _, counts = problem(0, 500, 4, exponent=0.6)
    plain, even = freeze(routers, 1, (2, 4)), freeze_balanced(routers, (2, 4), counts, 1.1, "sha")
    assert isinstance(plain, TableRouting)
    assert plain.table.expert_load(counts).max() > 1.3
    assert even.table.expert_load(counts).max() <= 1.1 + 1e-9
    assert (even.table.blocks, even.table.tokenizer, even.table.top_k) == ((2, 4), "sha", 1)
    same = (even.table.expert_LVK == plain.table.expert_LVK).mean()
    assert 0.4 < same < 1, "most ids stay where they were"


def test_a_limit_below_what_frequencies_force_is_raised_to_it() -> None:
    router = DistilledRouter("word", 50, 4, dim=8, layers=1, width=8, heads=2, positions=4)
    torch.nn.init.normal_(router.centroids)
    counts = np.ones(50, np.int64)
    counts[3] = 100
    table = freeze_balanced([router], (1,), counts, 1.1).table
    assert table.expert_load(counts).max() == pytest.approx(least_load(counts, 4, 1))
