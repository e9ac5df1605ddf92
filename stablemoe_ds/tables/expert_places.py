"""Which experts each rank holds, and how many tokens each rank then serves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stablemoe_ds.tables.expert_load import relative_load

NO_EXPERT = -1
"""Stands at a place that no expert fills, as experts need not divide evenly over the ranks."""


@dataclass(frozen=True)
class ExpertPlaces:
    """The experts of each MoE layer in the order of their places, which G ranks of an expert-parallel group share.

    Rank r has the places [r * n, (r + 1) * n), n = Y / G. The last ``replicated`` of them hold the same experts on
    every rank, and each of these serves the tokens of its own rank. All other experts have one place.

    expert_LY: int64 [L, Y], the expert at each place, or ``NO_EXPERT``. ranks: G.
    """

    expert_LY: NDArray[np.int64]  # noqa: N815
    ranks: int
    replicated: int = 0

    @classmethod
    def by_number(cls, layers: int, experts: int, ranks: int) -> ExpertPlaces:
        """Consecutive experts on each rank. ranks: G, which divides N."""
        return cls(np.tile(np.arange(experts), (layers, 1)), ranks)

    @classmethod
    def by_load(cls, load_LN: ArrayLike, ranks: int, replicated: int = 0) -> ExpertPlaces:
        """The ``replicated`` heaviest experts on every rank; the others where they even out what ranks serve.

        Of the others, the heaviest first, each to the rank with the least load of those that have fewer than
        (N - replicated) / G experts, rounded up (Graham 1969, longest processing time first, with a limit on the
        number). On a tie the lower expert and the lower rank come first; the experts of a rank stand by number.

        load_LN: numbers [L, N], what each expert serves. ranks: G.
        """
        placed = [_places_of_layer(load_N, ranks, replicated) for load_N in np.asarray(load_LN)]
        return cls(np.stack(placed), ranks, replicated)

    @property
    def of_each_rank(self) -> int:
        """Places of a rank: n."""
        return self.expert_LY.shape[1] // self.ranks

    def held_by(self, rank: int, layer: int) -> list[int]:
        """The experts of a rank, in the order of their places."""
        return self._by_rank[layer, rank].tolist()

    def experts_for(self, rank: int) -> NDArray[np.int64]:
        """int64 [L, Y]: the expert whose tokens ``rank`` sends to each place; ``NO_EXPERT``: it sends none there."""
        expert_LGE = self._by_rank.copy()
        others = np.arange(self.ranks) != rank
        expert_LGE[:, others, self.of_each_rank - self.replicated :] = NO_EXPERT
        return expert_LGE.reshape(self.expert_LY.shape)

    def places_for(self, rank: int) -> NDArray[np.int64]:
        """int64 [L, N]: the place that ``rank`` sends the tokens of each expert to."""
        expert_LY = self.experts_for(rank)
        layer, place = np.nonzero(expert_LY != NO_EXPERT)
        place_LN = np.empty((len(expert_LY), self.expert_LY.max() + 1), np.int64)
        place_LN[layer, expert_LY[layer, place]] = place
        return place_LN

    def rank_loads(self, load_LN: ArrayLike) -> NDArray[np.float64]:
        """float64 [L, G]: what each rank serves as a multiple of the mean.

        load_LN: numbers [L, N], what each expert serves. The tokens of a replicated one come from all ranks alike.
        """
        served_LY = np.take_along_axis(np.asarray(load_LN, np.float64), self.expert_LY.clip(0), axis=-1)
        served_LGE = np.where(self.expert_LY == NO_EXPERT, 0, served_LY).reshape(self._by_rank.shape)
        served_LGE[..., self.of_each_rank - self.replicated :] /= self.ranks
        return relative_load(served_LGE.sum(-1))

    @property
    def _by_rank(self) -> NDArray[np.int64]:
        return self.expert_LY.reshape(len(self.expert_LY), self.ranks, self.of_each_rank)


def _places_of_layer(load_N: NDArray[np.float64], ranks: int, replicated: int) -> NDArray[np.int64]:
    heaviest = np.argsort(-load_N, kind="stable").tolist()
    everywhere, others = sorted(heaviest[:replicated]), heaviest[replicated:]
    room = -(-len(others) // ranks)
    load_G = np.zeros(ranks)
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in others:
        open_ranks = [rank for rank in range(ranks) if len(held[rank]) < room]
        rank = min(open_ranks, key=lambda rank: load_G[rank])
        held[rank].append(expert)
        load_G[rank] += load_N[expert]
    filled = [[*sorted(own), *[NO_EXPERT] * (room - len(own)), *everywhere] for own in held]
    return np.array(filled, np.int64).reshape(-1)
