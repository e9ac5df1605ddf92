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
    """

    expert_parallel: int
    expert_rank: int
    tensor_group: dist.ProcessGroup | None
    sum_over_data_ranks: Callable[[Tensor], Tensor]
    order_LN: Tensor | None = None  # noqa: N815

    def held_experts(self, layer: int, experts: int) -> Sequence[int]:
        """Numbers of the experts that this rank holds in an MoE layer, in the order of their places."""
        held = experts // self.expert_parallel
        here = slice(self.expert_rank * held, (self.expert_rank + 1) * held)
        return range(experts)[here] if self.order_LN is None else self.order_LN[layer, here].tolist()


ALONE = LayerPlacement(1, 0, None, lambda counts: counts)
"""Of a layer in a single process."""
