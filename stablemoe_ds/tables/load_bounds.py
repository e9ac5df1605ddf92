"""What load a table of ids can have at best, and what tables reach on a text they were not made from.

Written for a decision that is taken before a device is rented: how many experts, how many of them an id has, and
over how many ranks they are spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from stablemoe_ds.tables.expert_load import relative_load
from stablemoe_ds.tables.expert_places import ExpertPlaces
from stablemoe_ds.tables.table import least_load


@dataclass(frozen=True)
class Bound:
    """What the frequencies of a text force on every table with ``experts`` experts, ``top_k`` of them for each id.

    commonest: the commonest id. share: of the tokens, p_max. forced: p_max * N / k, the load of the experts that serve
    this id as a multiple of the mean. least: max/mean load that no table goes below; 1 where nothing is forced.
    """

    experts: int
    top_k: int
    commonest: int
    share: float
    forced: float
    least: float


@dataclass(frozen=True)
class Reach:
    """What one layer of a table does on a text.

    load_N: tokens each expert serves, as a multiple of the mean. load_G: the same for each rank, if experts stand by
    number. placed_G: the same if they are placed by their load on the text that tables are made of, and the heaviest
    are replicated if that is asked for. dropped: for each
    capacity factor the share of (token, choice) pairs above it, 0 to 1.
    """

    name: str
    load_N: NDArray[np.float64]  # noqa: N815
    load_G: NDArray[np.float64]  # noqa: N815
    placed_G: NDArray[np.float64]  # noqa: N815
    dropped: tuple[float, ...]

    @property
    def max_load(self) -> float:
        return float(self.load_N.max())

    @property
    def max_rank_load(self) -> float:
        return float(self.load_G.max())

    @property
    def max_placed_load(self) -> float:
        return float(self.placed_G.max())

    @property
    def idle(self) -> float:
        """Share of the time that a rank of the mean load waits for the busiest one, if time follows load.

        With experts by number.
        """
        return 1 - 1 / self.max_rank_load if self.max_rank_load else 0.0


def bound(token_counts: NDArray[np.int64], experts: int, top_k: int) -> Bound:
    """The bound of a text. token_counts: int64 [V], how often each id occurs."""
    commonest = int(token_counts.argmax())
    share = float(token_counts[commonest] / max(1, token_counts.sum()))
    return Bound(experts, top_k, commonest, share, share * experts / top_k, least_load(token_counts, experts, top_k))


def most_experts(token_counts: NDArray[np.int64], top_k: int, load: float) -> int:
    """The largest number of experts with which the commonest id does not force a max/mean load above ``load``."""
    # In integers as far as possible: 0.1 * 30 is a little more than 3.
    return int(load * top_k * int(token_counts.sum()) / int(token_counts.max()) * (1 + 1e-12))


def reach(
    name: str,
    expert_VK: NDArray[np.int32],
    batch_counts: csr_array,
    known_counts: NDArray[np.int64],
    experts: int,
    ranks: int,
    capacities: Sequence[float],
    replicated: int = 0,
) -> Reach:
    """Judge one layer of a table.

    expert_VK: int32 [V, K], with the further rows of split ids, as all that follows. batch_counts: int64 [batches, V],
    the text in batches (:func:`count_batches`). known_counts: int64 [V], of the text that experts are placed by
    (:class:`ExpertPlaces`). ranks: of the expert-parallel group. capacities: rows an expert takes of one batch, as
    multiples of the mean. A run rounds capacity up to whole rows; that is left out here. replicated: experts that every
    rank has.
    """
    table_rows, top_k = expert_VK.shape
    places = (np.repeat(np.arange(table_rows), top_k), expert_VK.reshape(-1))
    serves_VN = csr_array((np.ones(expert_VK.size, np.int64), places), shape=(table_rows, experts))
    served = (batch_counts @ serves_VN).toarray()
    total = max(1, int(served.sum()))
    mean = served.sum(1, keepdims=True) / experts
    dropped = tuple(float(np.maximum(served - factor * mean, 0).sum() / total) for factor in capacities)
    load_N = relative_load(served.sum(0))
    by_number = ExpertPlaces.by_number(1, experts, ranks)
    by_load = ExpertPlaces.by_load((known_counts @ serves_VN)[None], ranks, replicated)
    load_G, placed_G = (places.rank_loads(load_N[None])[0] for places in (by_number, by_load))
    return Reach(name, load_N, load_G, placed_G, dropped)


def round_robin(vocab_size: int, experts: int, top_k: int) -> NDArray[np.int32]:
    """int32 [V, K]: id mod N and the experts behind it, the placeholder of many trainers."""
    return ((np.arange(vocab_size)[:, None] + np.arange(top_k)) % experts).astype(np.int32)
