"""Where one layer of the model stands among the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class LayerPlacement:
    """Where a layer stands in the run: degrees, this rank's place in them, and how to sum over data ranks.

    tensor_group is None without tensor parallelism.
    """

    expert_parallel: int
    expert_rank: int
    tensor_group: dist.ProcessGroup | None
    sum_over_data_ranks: Callable[[Tensor], Tensor]


ALONE = LayerPlacement(1, 0, None, lambda counts: counts)
"""Of a layer in a single process."""
