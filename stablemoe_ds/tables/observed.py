"""A table of a router that was watched: where it sent each id of a text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.balanced_choice import balanced_choices
from stablemoe_ds.tables.placing import deal_absent
from stablemoe_ds.tables.table import least_load


def observed_table(served_LVN: NDArray[np.int64], top_k: int, max_load: float | None) -> NDArray[np.int32]:
    """int32 [L, V, K]: the experts each id was sent to most often; on a tie the lower index.

    served_LVN: int64 [L, V, N], how often. max_load: keep as much of the routing as this load allows (max/mean); None:
    no limit. Ids that were not seen are dealt out evenly.
    """
    layers, vocab, experts = served_LVN.shape
    table_LVK = np.empty((layers, vocab, top_k), dtype=np.int32)
    for layer, served_VN in enumerate(served_LVN):
        counts_V = served_VN.sum(1)
        if max_load is None:
            table_LVK[layer] = np.argsort(-served_VN, axis=1, kind="stable")[:, :top_k]
        else:
            share_VN = served_VN / np.maximum(counts_V, 1)[:, None]
            limit = max(max_load, least_load(counts_V, experts, top_k))
            table_LVK[layer] = balanced_choices(share_VN, counts_V, limit, top_k)
        deal_absent(table_LVK[layer], counts_V, experts, [layer])
    return table_LVK


def explained(served_LVN: NDArray[np.int64], expert_LVK: NDArray[np.int32]) -> list[float]:
    """Of each layer, the share of the routing that a table of ids reproduces: 1 if the id decides.

    A share of (token, choice) pairs. Raises UserError if a layer has served nothing.
    """
    served_L = served_LVN.sum((1, 2))
    if not served_L.all():
        raise UserError("no expert has served a token of the text: there is no routing to make a table of")
    kept_L = np.take_along_axis(served_LVN, expert_LVK.astype(np.int64), axis=2).sum((1, 2))
    return [float(kept / served) for kept, served in zip(kept_L, served_L, strict=True)]
