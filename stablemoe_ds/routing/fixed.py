"""Routes that are known from token ids before a step begins: stage 2, evaluation and generation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.routing.distilled import DistilledRouter
from stablemoe_ds.routing.router import best_experts
from stablemoe_ds.routing.routes import KnownRoutes
from stablemoe_ds.tables.balanced_choice import balanced_choice
from stablemoe_ds.tables.builders import even_table, how_made, random_table
from stablemoe_ds.tables.table import RoutingTable, least_load


def _by_block(blocks: Sequence[int], expert_LBSK: Tensor) -> KnownRoutes:
    """Tokens sequence first, t = s * B + b."""
    return dict(zip(blocks, expert_LBSK.transpose(1, 2).flatten(1, 2), strict=True))


class TableRouting:
    """Look every id up in a :class:`RoutingTable`, for the layers that it has."""

    def __init__(self, table: RoutingTable, device: torch.device | str = "cpu") -> None:
        self.table, self.blocks = table, table.blocks
        self.looks_back = table.split is not None
        self._expert_LVK = torch.tensor(table.expert_LVK, device=device)
        if table.split is not None:
            self._place_V = torch.tensor(table.split.place_V, device=device)
            self._row_JV = torch.tensor(table.split.row_JV, device=device)

    def __call__(self, ids_BS: Tensor) -> KnownRoutes:
        """From ids, int64 [B, S]."""
        rows_BS = self._rows(ids_BS) if self.looks_back else ids_BS
        return _by_block(self.table.blocks, self._expert_LVK[:, rows_BS].long())

    def _rows(self, ids_BS: Tensor) -> Tensor:
        """int64 [B, S]: the row of the table that each token follows, as :meth:`SplitIds.rows` finds it."""
        first, later, before = ids_BS[:, :1], ids_BS[:, 1:], ids_BS[:, :-1]
        place = self._place_V[later].long()
        return torch.cat([first, torch.where(place < 0, later, self._row_JV[place, before].long())], dim=1)


class FrozenRouters:
    """A private copy of distilled routers that need more than the id: bigram, cnn, transformer.

    blocks: of the MoE layers they are of.
    """

    table = None
    looks_back = True

    def __init__(self, routers: Sequence[DistilledRouter], top_k: int, blocks: tuple[int, ...]) -> None:
        self._routers = [copy.deepcopy(router).requires_grad_(False).eval() for router in routers]
        self._top_k, self.blocks = top_k, blocks

    @torch.no_grad()
    def __call__(self, ids_BS: Tensor) -> KnownRoutes:
        """From ids, int64 [B, S]."""
        chosen = [best_experts(router(ids_BS), self._top_k) for router in self._routers]
        return _by_block(self.blocks, torch.stack(chosen))

    def parameters(self) -> list[Tensor]:
        """The frozen tensors, for a proof that they do not move."""
        return [parameter for router in self._routers for parameter in router.parameters()]


def freeze(
    routers: Sequence[DistilledRouter], top_k: int, blocks: tuple[int, ...], tokenizer: str = "", **origin: Any
) -> TableRouting | FrozenRouters:
    """What stage 2 follows: a table for word routers, frozen copies for the other kinds.

    origin: what the table is to say of where the routers come from.
    """
    if not all(router.is_table for router in routers):
        return FrozenRouters(routers, top_k, blocks)
    table = RoutingTable.from_scores(_scores(routers), top_k, blocks, tokenizer, how_made("frozen", **origin))
    return TableRouting(table, routers[0].centroids.device)


def freeze_balanced(
    routers: Sequence[DistilledRouter],
    blocks: tuple[int, ...],
    token_counts: NDArray[np.int64],
    max_load: float,
    tokenizer: str = "",
    **origin: Any,
) -> TableRouting:
    """A table of word routers that keeps the most log-likelihood of stage 1's routing under a load limit.

    token_counts: int64 [V]. max_load: see :func:`balanced_choice`; where one id alone exceeds it, its share is the
    limit. One expert a token. origin: see :func:`freeze`. Raises ValueError for routers that are no table.
    """
    scores_LVN = _scores(routers).astype(np.float64)
    likelihood_LVN = scores_LVN - np.logaddexp.reduce(scores_LVN, axis=-1, keepdims=True)
    experts = scores_LVN.shape[-1]
    limit = max(max_load, least_load(token_counts, experts, 1))
    chosen_LV = np.stack([balanced_choice(layer_VN, token_counts, limit) for layer_VN in likelihood_LVN])
    made = how_made("frozen", options={"max_load": max_load}, **origin)
    table = RoutingTable(np.ascontiguousarray(chosen_LV[..., None]), experts, blocks, tokenizer, made)
    return TableRouting(table, routers[0].centroids.device)


def hash_table(
    moe: MoEConfig, token_counts: NDArray[np.int64], seed: int, tokenizer: str, **origin: Any
) -> RoutingTable:
    """The table of router ``hash``, random or even; token_counts: int64 [V]. origin: see :func:`freeze`."""
    layers = len(moe.layers)
    if moe.hash_table == "random":
        expert_LVK = random_table(len(token_counts), moe.experts, moe.top_k, layers, seed)
    else:
        expert_LVK = even_table(token_counts, moe.experts, moe.top_k, layers, seed)
    made = how_made(moe.hash_table, options={}, seed=seed, **origin)
    return RoutingTable(expert_LVK, moe.experts, tuple(moe.layers), tokenizer, made)


def _scores(routers: Sequence[DistilledRouter]) -> NDArray[np.float32]:
    """float32 [L, V, N]: distilled affinity of every id."""
    return torch.stack([router.scores_of_vocabulary() for router in routers]).float().cpu().numpy()
