"""Routes that are known from token ids before a step begins: stage 2, evaluation and generation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from stablemoe_ds.routing.distilled import DistilledRouter
from stablemoe_ds.routing.stablemoe import best_experts
from stablemoe_ds.routing.table import RoutingTable


class FixedRouting(Protocol):
    """A pure function from ids to experts."""

    def __call__(self, ids_BS: Tensor) -> Tensor:
        """ids int64 [B, S] -> experts int64 [L, T, K], T = S * B in sequence-first order."""
        ...


def _sequence_first(expert_LBSK: Tensor) -> Tensor:
    return expert_LBSK.transpose(1, 2).flatten(1, 2)


class TableRouting:
    """Look every id up in a :class:`RoutingTable`."""

    def __init__(self, table: RoutingTable, device: torch.device | str = "cpu") -> None:
        self.table = table
        self._expert_LVK = torch.tensor(table.expert_LVK, device=device)

    def __call__(self, ids_BS: Tensor) -> Tensor:
        return _sequence_first(self._expert_LVK[:, ids_BS].long())


class FrozenRouters:
    """A private copy of distilled routers that need more than the id: bigram, cnn, transformer."""

    def __init__(self, routers: Sequence[DistilledRouter], top_k: int) -> None:
        self._routers = [copy.deepcopy(router).requires_grad_(False).eval() for router in routers]
        self._top_k = top_k

    @torch.no_grad()
    def __call__(self, ids_BS: Tensor) -> Tensor:
        return _sequence_first(torch.stack([best_experts(router(ids_BS), self._top_k) for router in self._routers]))

    def parameters(self) -> list[Tensor]:
        """The frozen tensors, for a proof that they do not move."""
        return [parameter for router in self._routers for parameter in router.parameters()]


def freeze(
    routers: Sequence[DistilledRouter], top_k: int, blocks: tuple[int, ...], tokenizer: str = ""
) -> TableRouting | FrozenRouters:
    """What stage 2 follows: a table for word routers, frozen copies for the other kinds."""
    if not all(router.is_table for router in routers):
        return FrozenRouters(routers, top_k)
    scores_LVN = torch.stack([router.scores_of_vocabulary() for router in routers])
    table = RoutingTable.from_scores(scores_LVN.float().cpu().numpy(), top_k, blocks, tokenizer)
    return TableRouting(table, scores_LVN.device)
