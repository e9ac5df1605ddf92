"""Frozen routing: the table of a word router, private copies of the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stablemoe_ds.routing.distilled import DistilledRouter
from stablemoe_ds.routing.fixed import FrozenRouters, TableRouting, freeze
from stablemoe_ds.routing.routes import TokenView
from stablemoe_ds.routing.source import routes_of
from stablemoe_ds.tables.builders import random_table
from stablemoe_ds.tables.table import RoutingTable
from tests.tables.texts import slow_experts, split_at_random

VOCAB, N, LENGTH = 40, 6, 12


def make(kind: str, seed: int) -> DistilledRouter:
    torch.manual_seed(seed)
    router = DistilledRouter(kind, VOCAB, N, dim=8, layers=1, width=8, heads=2, positions=LENGTH)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return router


def some_ids(rows: int = 4) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("top_k", [1, 2])
def test_table_names_the_routers_best_for_every_id(top_k):
    routers = [make("word", 1), make("word", 2)]
    routing = freeze(routers, top_k, (2, 4), "sha")
    assert isinstance(routing, TableRouting)
    assert (routing.table.blocks, routing.table.tokenizer) == ((2, 4), "sha")
    for layer, router in enumerate(routers):
        logits = router(torch.arange(VOCAB)[:, None])[:, 0].detach().numpy()
        best = np.argsort(-logits, axis=-1)[:, :top_k]
        assert np.array_equal(routing.table.expert_LVK[layer], best)


@pytest.mark.parametrize("kind", ["word", "bigram", "cnn", "transformer"])
def test_routes_are_sequence_first_and_follow_the_router(kind):
    routers, ids_BS = [make(kind, 1), make(kind, 2)], some_ids()
    routes = freeze(routers, 2, (1, 2))(ids_BS)
    shape = (torch.int64, (LENGTH * 4, 2))
    assert {block: (expert_TK.dtype, tuple(expert_TK.shape)) for block, expert_TK in routes.items()} == {
        1: shape,
        2: shape,
    }
    with torch.no_grad():
        for block, router in enumerate(routers, 1):
            best = router.eval()(ids_BS).sort(-1, descending=True).indices[..., :2]
            for b in range(4):
                for s in range(LENGTH):
                    assert torch.equal(routes[block][s * 4 + b], best[b, s])


def test_ties_go_to_the_lowest_index_in_table_and_copy_alike():
    for kind in ("word", "bigram"):
        router = make(kind, 1)
        with torch.no_grad():
            for parameter in router.parameters():  # whole numbers: equal centroids give equal logits to the bit
                parameter.copy_((parameter * 4).round())
            router.centroids.copy_(router.centroids[[0, 0, 1, 1, 0, 1]])
        assert set(freeze([router], 1, (1,))(some_ids())[1].unique().tolist()) == {0, 2}


@pytest.mark.parametrize("kind", ["word", "bigram", "cnn", "transformer"])
def test_later_changes_of_the_router_do_not_matter(kind):
    router, ids_BS = make(kind, 1), some_ids()
    routing = freeze([router], 1, (1,))
    before = routing(ids_BS)[1]
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    assert torch.equal(routing(ids_BS)[1], before)
    assert not torch.equal(freeze([router], 1, (1,))(ids_BS)[1], before)
    if isinstance(routing, FrozenRouters):
        assert not any(p.requires_grad for p in routing.parameters())
        assert len(routing.parameters()) == len(list(router.parameters()))


def test_nan_is_not_frozen_into_a_table():
    router = make("word", 1)
    with torch.no_grad():
        router.features.embedding.weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        freeze([router], 1, (1,))


@pytest.mark.parametrize("parts", [1, 3])
def test_a_table_that_splits_ids_is_looked_up_token_by_token(parts: int) -> None:
    """Also where a rank has a part of the sequences only, whose first token comes behind another rank's."""
    table = split_at_random(RoutingTable(random_table(VOCAB, N, 2, 2, seed=3), N, (1, 4)), [0, 7, 8, 30], 2)
    routing, ids_BS = TableRouting(table), some_ids()
    wanted = torch.tensor([slow_experts(table, row) for row in ids_BS.tolist()])  # [B, L, S, K]
    each = LENGTH // parts
    for part in range(parts):
        here = slice(part * each, (part + 1) * each)
        view = TokenView(ids_BS[:, here], torch.ones(4 * each), ids_BS if parts > 1 else None, here.start)
        for layer, block in enumerate((1, 4)):
            assert torch.equal(routes_of(view, routing)[block], wanted[:, layer, here].transpose(0, 1).flatten(0, 1))
