"""Where one layer of the model stands among the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class LayerPlacement:
    """Where a layer stands in the run: degrees, this rank's place in them, and how to sum over data ranks.

    tensor_group is None without tensor parallelism. order_LN: int64 [L, N] on the CPU, the experts of each MoE layer in
    the order of their places (:func:`stablemoe_ds.tables.expert_places.order_by_load`); None: by number.
    sequence_group: the ranks that share sequences, in the order of their parts; None without sequence parallelism.
    """

    expert_parallel: int
    expert_rank: int
    tensor_group: dist.ProcessGroup | None
    sum_over_data_ranks: Callable[[Tensor], Tensor]
    order_LN: Tensor | None = None  # noqa: N815
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
        held = experts // self.expert_parallel
        here = slice(self.expert_rank * held, (self.expert_rank + 1) * held)
        return range(experts)[here] if self.order_LN is None else self.order_LN[layer, here].tolist()


ALONE = LayerPlacement(1, 0, None, lambda counts: counts)
"""Of a layer in a single process."""
