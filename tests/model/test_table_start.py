"""Routers that start from a table: what they choose before the first update, and that nothing else moves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stablemoe_ds.routing.fixed import freeze
from stablemoe_ds.routing.router import best_experts
from stablemoe_ds.tables.builders import random_table
from stablemoe_ds.tables.table import RoutingTable
from tests.tiny import VOCAB

COUNTS = np.random.default_rng(5).integers(0, 50, VOCAB)


def table_of(experts: int, top_k: int = 1) -> RoutingTable:
    return RoutingTable(random_table(VOCAB, experts, top_k, 2, seed=3), experts, (2, 3))


@pytest.mark.parametrize(
    ("experts", "dims", "top_k"), [(4, 50, 1), (32, 50, 1), (32, 50, 3), (64, 20, 1), (64, 50, 2), (4, 50, 4)]
)
def test_the_distilled_router_chooses_what_the_table_says(experts: int, dims: int, top_k: int) -> None:
    """With more experts than dimensions as well, where centroids are not orthogonal."""
    from stablemoe_ds.model.table_start import MARGIN, vectors_of_table

    random = torch.Generator().manual_seed(1)
    expert_VK = torch.from_numpy(random_table(500, experts, top_k, 1, seed=2)[0]).long()
    centroid_NI = F.normalize(torch.nn.init.orthogonal_(torch.empty(experts, dims), generator=random)) * 0.1
    vector_VI = torch.randn(500, dims, generator=random)
    moved_VI = vectors_of_table(expert_VK, vector_VI, centroid_NI)
    score_VN = moved_VI @ centroid_NI.T
    assert torch.equal(best_experts(score_VN, top_k).sort(1).values, expert_VK.sort(1).values)
    if top_k < experts:
        ranked = score_VN.sort(1, descending=True).values
        assert (ranked[:, top_k - 1] - ranked[:, top_k]).min() > 0.1 * MARGIN * 0.49, "no rounding turns a choice"
    assert (moved_VI - vector_VI).norm(dim=1).mean() < 1.5 * math.sqrt(dims), "still about N(0, 1)"


@pytest.mark.parametrize("router", ["stablemoe", "switch"])
@pytest.mark.parametrize("embedding", ["plain", "scaled"])
def test_a_fresh_model_starts_from_the_table_and_is_the_same_otherwise(
    router: str, embedding: str, fresh, whole_weights
):
    from stablemoe_ds.model.table_start import start_from_table

    sections = {"moe": {"router": router}, "model": {"embedding": embedding}}
    model, cold = fresh(**sections), whole_weights(fresh(**sections))
    table = table_of(4)
    start_from_table(model, table, COUNTS)
    warm = whole_weights(model)
    ours = {name for name, value in warm.items() if not torch.allclose(value, cold[name], rtol=1e-5)}
    tensors = {"router.centroids"} | (
        {"router.distilled.features.embedding.weight"} if router == "stablemoe" else set()
    )
    assert {name.split("moe.")[-1] for name in ours} == tensors
    assert len(ours) == 2 * len(tensors), "of both layers"
    if router == "stablemoe":
        frozen = freeze(model.distilled_routers, 1, table.blocks, "").table
        assert np.array_equal(frozen.expert_LVK, table.expert_LVK)
    word_VD = cold["embedding.word_embeddings.weight"]
    for layer, blocks in enumerate(model.moe_layers):
        for expert in range(4):
            mean = torch.zeros(32)
            for id in np.flatnonzero(table.expert_LVK[layer, :, 0] == expert):
                mean += math.sqrt(COUNTS[id]) * word_VD[id] / word_VD[id].norm()
            wanted = 0.1 * mean / mean.norm()
            torch.testing.assert_close(blocks.router.centroids[expert].detach(), wanted, rtol=1e-4, atol=1e-6)


def test_an_expert_whose_ids_do_not_occur_starts_as_it_would(fresh, whole_weights):
    from stablemoe_ds.model.table_start import start_from_table

    model, cold = fresh(), whole_weights(fresh())
    table = table_of(4)
    counts = np.where(table.expert_LVK[0, :, 0] == 2, 0, 7)
    start_from_table(model, table, counts)
    (name,) = (name for name in cold if name.endswith("router.centroids") and "layers.2." in name)
    moved = (whole_weights(model)[name] != cold[name]).any(1).tolist()
    assert moved == [True, True, False, True]
