"""Where one layer of the model stands among the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from stablemoe_ds.tables.expert_places import ExpertPlaces

REPLICATED = "ep_size_1"
"""DeepSpeed's name for the groups of experts of which every rank has a copy, as without expert parallelism."""


@dataclass(frozen=True)
class LayerPlacement:
    """Where a layer stands in the run: degrees, this rank's place in them, and how to sum over data ranks.

    tensor_group is None without tensor parallelism. places: of the experts of each MoE layer; None: by number.
    sequence_group: the ranks that share sequences, in the order of their parts; None without sequence parallelism.
    """

    expert_parallel: int
    expert_rank: int
    tensor_group: dist.ProcessGroup | None
    sum_over_data_ranks: Callable[[Tensor], Tensor]
    places: ExpertPlaces | None = None
    sequence_group: dist.ProcessGroup | None = None

    @property
    def sequence_parallel(self) -> int:
        """Ranks that share sequences."""
        return 1 if self.sequence_group is None else dist.get_world_size(self.sequence_group)

    @property
    def sequence_rank(self) -> int:
        """Which part of every sequence this rank has, from 0."""
        return 0 if self.sequence_group is None else dist.get_rank(self.sequence_group)

    def held_experts(self, layer: int, experts: int) -> Sequence[int]:
        """Numbers of the experts that this rank holds in an MoE layer, in the order of their places."""
        if self.places is not None:
            return self.places.held_by(self.expert_rank, layer)
        held = experts // self.expert_parallel
        return range(self.expert_rank * held, (self.expert_rank + 1) * held)


ALONE = LayerPlacement(1, 0, None, lambda counts: counts)
"""Of a layer in a single process."""
