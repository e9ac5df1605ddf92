"""Routers that start from a table instead of at random: stage 1 then improves what the table knows already.

Start values still follow from (seed, name) alone, and from the table and the counts of the training text, which are the
same on every rank: one process and sixty-four start from the same model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from numpy import int64
from numpy.typing import NDArray
from torch import Tensor

from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.model.initialize import initialize_pieces, start_value
from stablemoe_ds.model.layout import pieces
from stablemoe_ds.routing.router import CentroidRouter
from stablemoe_ds.tables.table import RoutingTable

WORDS = "embedding.word_embeddings.weight"
MARGIN = 1.0
"""How far an id's vector, which is N(0, 1), points more along the centroids of its experts than along any other."""
ROUNDS = 200
CHUNK = 16_384
"""Ids that are looked at together."""


@torch.no_grad()
def start_from_table(model: StableMoEGPT, table: RoutingTable, token_counts: NDArray[int64]) -> None:
    """Let the routers of a fresh model begin at ``table``; before its weights are handed to an engine.

    Routers without memory (``initialize.without_memory``) get it.

    table: with a layer for each MoE layer of the model. token_counts: int64 [V], of the training text.
    """
    run, routers = model.run_config, {id(p) for layer in model.moe_layers for p in layer.router.parameters()}
    initialize_pieces((one for one in pieces(model, 1) if one.parameter.is_meta and id(one.parameter) in routers), run)
    word_VD = start_value(WORDS, (table.vocab_size, run.model.hidden_size), run).double()
    count_V = torch.tensor(token_counts, dtype=torch.float64)
    for layer in model.moe_layers:
        router = layer.router
        assert isinstance(router, CentroidRouter)
        expert_VK = torch.tensor(table.expert_LVK[layer.index], dtype=torch.long)
        router.centroids.copy_(centroids_of_table(expert_VK, count_V, word_VD, router.centroids.double()))
        if router.distilled is not None:
            features, centroids = router.distilled.features, router.distilled.centroids
            # With more experts than dimensions their lengths differ.
            centroids.copy_(F.normalize(centroids) * run.moe.centroid_gain)
            vector_VI = vectors_of_table(expert_VK, features.embedding.weight.double(), centroids.double())
            features.embedding.weight.copy_(vector_VI)


def centroids_of_table(expert_VK: Tensor, count_V: Tensor, word_VD: Tensor, start_ND: Tensor) -> Tensor:
    """[N, D]: the direction of the mean embedding of each expert's ids, at the length of ``start_ND``.

    expert_VK: int64, the experts of each id. word_VD: the embedding that the model starts with. An id weighs as the
    square root of its count, so that the commonest do not speak for all. An expert whose ids do not occur keeps
    ``start_ND``.
    """
    weighted_VD = F.normalize(word_VD) * count_V.sqrt()[:, None]
    mean_ND = torch.zeros_like(start_ND)
    for expert_V in expert_VK.unbind(1):
        mean_ND.index_add_(0, expert_V, weighted_VD)
    length_N = start_ND.norm(dim=1, keepdim=True)
    return torch.where(mean_ND.any(1, keepdim=True), F.normalize(mean_ND) * length_N, start_ND)


def vectors_of_table(expert_VK: Tensor, vector_VI: Tensor, centroid_NI: Tensor) -> Tensor:
    """[V, I]: ``vector_VI`` moved until the best centroids of each id are those of its experts.

    Each round moves an id along the centroid of the expert that it lacks most. Where centroids are orthogonal, K rounds
    are enough; where there are more than dimensions, a move helps the others a little, too, and more rounds follow.
    Several experts an id cannot always be best together where experts are several times as many as dimensions; then
    it ends near. Centroids must be of equal length.
    """
    unit_NI = F.normalize(centroid_NI)
    parts = []
    for part_VI, part_VK in zip(vector_VI.split(CHUNK), expert_VK.split(CHUNK), strict=True):
        moved_VI = part_VI.clone()
        chosen_VN = torch.zeros(len(part_VK), len(unit_NI), dtype=torch.bool).scatter_(1, part_VK, True)
        for _ in range(ROUNDS):
            score_VN = moved_VI @ unit_NI.T
            least_V, expert_V = score_VN.masked_fill(~chosen_VN, torch.inf).min(1)
            lacking_V = (score_VN.masked_fill(chosen_VN, -torch.inf).amax(1) + MARGIN - least_V).clamp_min(0)
            if float(lacking_V.max()) < MARGIN / 2:
                break
            moved_VI += lacking_V[:, None] * unit_NI[expert_V]
        parts.append(moved_VI)
    return torch.cat(parts)
