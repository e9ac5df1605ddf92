"""Every choice of the builders from neighbours, through ``build_table``, held against arithmetic written out here.

Pairs are counted one by one, vectors come from a dense decomposition, centroids are sums over the ids of an expert.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stablemoe_ds.config.table_options import VectorOptions
from stablemoe_ds.tables.builders import build_table
from tests.tables.test_balanced_choice import kept, load, optimum
from tests.tables.test_vectors import dense_vectors
from tests.tables.texts import corpus_of, random_stream, slow_followers, text_of_kinds

VOCAB, EXPERTS = 60, 6
STREAM = random_stream(5, vocab=VOCAB, tokens=8000)
TEXT = corpus_of(STREAM, VOCAB)
COUNTS = TEXT.token_counts
HEAVIEST_FIRST = sorted(range(VOCAB), key=lambda index: (-COUNTS[index], index))
Matrix = NDArray[np.float64]


@cache
def vectors(window: int = 1) -> Matrix:
    return dense_vectors(slow_followers(STREAM, VOCAB, window).astype(float), VectorOptions(dims=10))


@cache
def scores() -> Matrix:
    """Of the clusters that seed 3 comes to, whatever is made of them."""
    return cosines(built("cooccurrence", choice="nearest")[0, :, 0], vectors())


@cache
def built(builder: str, top_k: int = 1, blocks: int = 1, **options: Any) -> NDArray[np.int32]:
    """int32 [L, V, K]."""
    shape: dict[str, Any] = {"experts": EXPERTS, "top_k": top_k, "blocks": range(1, blocks + 1)}
    return build_table(builder, {"dims": 10, **options}, TEXT, seed=3, **shape).expert_LVK


def cosines(expert_V: NDArray[np.int32], seen: Matrix, counts: NDArray[np.int64] = COUNTS) -> Matrix:
    """[V, N]: of each id and the centroid of each expert's ids, which weigh the square root of their counts."""
    found = np.zeros((len(counts), EXPERTS))
    for expert in range(EXPERTS):
        total = np.zeros(seen.shape[1])
        for index in np.flatnonzero(expert_V == expert):
            total += np.sqrt(counts[index]) * seen[index]
        for index in range(len(counts)):
            found[index, expert] = seen[index] @ total / np.linalg.norm(total)
    return found


def best_of_random_starts(seen: Matrix) -> float:
    """The largest sum of weight * cosine of 20 plain k-means."""
    random, best = np.random.default_rng(0), -np.inf
    for _ in range(20):
        centroids, before = seen[random.choice(VOCAB, EXPERTS, replace=False)], None
        while True:
            nearest = (seen @ centroids.T).argmax(1)
            if before is not None and (before == nearest).all():
                break
            before = nearest
            for expert in set(nearest.tolist()):
                total = (np.sqrt(COUNTS[nearest == expert, None]) * seen[nearest == expert]).sum(0)
                centroids[expert] = total / np.linalg.norm(total)
        best = max(best, float(np.sqrt(COUNTS) @ (seen @ centroids.T).max(1)))
    return best


@pytest.mark.parametrize("window", [1, 2])
def test_clusters_are_those_of_k_means(window: int) -> None:
    """Each id is nearest to the centroid of its own, and no other start comes to something better by much."""
    (expert_V,) = built("cooccurrence", window=window, choice="nearest")[:, :, 0]
    found = cosines(expert_V, vectors(window))
    own = found[np.arange(VOCAB), expert_V]
    assert (own >= found.max(1) - 1e-9).all()
    assert np.sqrt(COUNTS) @ own >= 0.97 * best_of_random_starts(vectors(window))


def test_slices_are_clusters_of_other_dimensions() -> None:
    table_LV = built("cooccurrence", blocks=2, layers="slices", choice="nearest")[..., 0]
    for layer, expert_V in enumerate(table_LV):
        part = vectors()[:, layer::2]
        found = cosines(expert_V, part / np.linalg.norm(part, axis=1, keepdims=True))
        assert (found[np.arange(VOCAB), expert_V] >= found.max(1) - 1e-9).all()


def test_several_experts_are_the_nearest_ones() -> None:
    table_VK = built("cooccurrence", top_k=3, choice="nearest")[0]
    for row, cosine in zip(table_VK.tolist(), scores(), strict=True):
        assert row == sorted(range(EXPERTS), key=lambda expert: -cosine[expert])[:3]


def test_balanced_is_within_a_hundredth_of_the_exact_optimum() -> None:
    expert_V = built("cooccurrence", max_load=1.1)[0, :, 0]
    assert load(COUNTS, expert_V, EXPERTS) <= 1.1
    best = optimum(scores(), COUNTS, 1.1)
    assert best - 0.01 <= kept(scores(), COUNTS, expert_V) <= best + 1e-3


def test_several_balanced_experts_keep_the_limit_and_most_of_the_nearest() -> None:
    table_VK = built("cooccurrence", top_k=2, max_load=1.1)[0]
    served = np.zeros(EXPERTS)
    for index in range(VOCAB):
        served[table_VK[index]] += COUNTS[index]
    assert served.max() / served.mean() <= 1.1 + 1e-9
    first = optimum(scores(), COUNTS, 1.1)
    assert kept(scores(), COUNTS, table_VK[:, 0]) >= first - 0.01, "the first choice is made as if it were the only one"
    nearest = np.sort(scores(), axis=1)[:, ::-1]
    mean = [kept(scores(), COUNTS, table_VK[:, choice]) for choice in range(2)]
    assert sum(mean) >= 0.8 * float((COUNTS[:, None] * nearest[:, :2]).sum() / COUNTS.sum())


def test_greedy_takes_the_nearest_with_room_the_commonest_first() -> None:
    expert_V, served = built("cooccurrence", choice="greedy", max_load=1.1)[0, :, 0], np.zeros(EXPERTS)
    for index in HEAVIEST_FIRST:
        fits = [e for e in range(EXPERTS) if served[e] + COUNTS[index] <= 1.1 * COUNTS.sum() / EXPERTS]
        wanted = max(fits, key=lambda e: scores()[index, e]) if fits else int(served.argmin())
        assert expert_V[index] == wanted
        served[wanted] += COUNTS[index]


def test_alternating_finds_clusters_that_fit_the_limit_better() -> None:
    """Ids are nearer to the centroid of those they are with than where clusters were found without the limit."""
    text, nearness = text_of_kinds(vocab=80, tokens=20_000, absent=0), []
    seen = dense_vectors(slow_followers(text.streams[0], 80, 1).astype(float), VectorOptions(dims=10))
    for choice in ("alternating", "balanced"):
        options = {"dims": 10, "choice": choice, "max_load": 1.1}
        table = build_table("cooccurrence", options, text, experts=EXPERTS, top_k=1, blocks=[1], seed=3)
        expert_V = table.expert_LVK[0, :, 0]
        assert load(text.token_counts, expert_V, EXPERTS) <= 1.1
        nearness.append(kept(cosines(expert_V, seen, text.token_counts), text.token_counts, expert_V))
    assert nearness[0] > nearness[1] + 0.01


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("window", [1, 2])
def test_scattered_takes_the_experts_least_like_an_id(window: int, top_k: int) -> None:
    """Step by step, among those with room; which of equally unlike ones comes first is free."""
    table_VK, seen = built("scattered", top_k=top_k, window=window)[0], vectors(window)
    total, served = np.zeros((EXPERTS, seen.shape[1])), np.zeros(EXPERTS)
    for index in HEAVIEST_FIRST:
        room = 1.3 * top_k * COUNTS.sum() / EXPERTS
        alike = {
            expert: seen[index] @ total[expert] / (np.linalg.norm(total[expert]) or 1)
            for expert in range(EXPERTS)
            if served[expert] + COUNTS[index] <= room
        }
        assert len(alike) >= top_k
        worst = sorted(alike.values())[top_k - 1]
        for expert in table_VK[index].tolist():
            assert alike[expert] <= worst + 1e-9
            total[expert] += np.sqrt(COUNTS[index]) * seen[index]
            served[expert] += COUNTS[index]
