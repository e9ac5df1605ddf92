"""A table for more experts, or for fewer."""

from __future__ import annotations

import numpy as np

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.table import RoutingTable


def replicated_table(table: RoutingTable, times: int) -> RoutingTable:
    copy_V1 = np.arange(table.vocab_size, dtype=np.int32)[:, None] % times
    return RoutingTable(
        table.expert_LVK * np.int32(times) + copy_V1, table.experts * times, table.blocks, table.tokenizer
    )


def merged_table(table: RoutingTable, times: int) -> RoutingTable:
    """Raises UserError if an id would go to the same expert twice."""
    expert_LVK = table.expert_LVK // np.int32(times)
    ordered = np.sort(expert_LVK, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise UserError(
            "moe.experts: ids whose experts are merged would go to the same one twice; nearest that works: a model of "
            "top_k 1"
        )
    return RoutingTable(expert_LVK, table.experts // times, table.blocks, table.tokenizer)
