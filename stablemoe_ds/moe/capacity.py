"""The paper's capacity mode: an expert takes so many tokens and no more; the rest pass through unchanged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def capacity_of(factor: float, routed: int, experts: int) -> int:
    """Tokens one expert takes: its mean share of ``routed`` (token, choice) pairs times ``factor``, rounded up.

    At least 1: an expert that takes nothing learns nothing, without any sign of it.
    """
    share = factor * routed / experts
    return max(1, math.ceil(share * (1 - 1e-12)))  # 0.1 * 30 is a little more than 3, and must not become 4


def kept_rows(
    expert_splits: Sequence[int], capacity: int, experts: Sequence[int], seed: int
) -> tuple[Tensor, list[int]]:
    """Choose which rows each expert serves when more than ``capacity`` arrived.

    expert_splits: rows of each local expert, rows sorted by expert. experts: their global ids.
    seed: seed of this layer's draw. Victims are random, not the last to arrive, and follow from (seed, global
    expert id, number of rows), so that recomputation chooses the same ones. Rows arrive in the order of ranks, so
    which token a victim is depends on the layout, unlike everything else in this package.

    Returns int64 [R'] ascending row indices that are kept (on the CPU), and the rows each expert keeps.
    """
    kept: list[Tensor] = []
    start = 0
    for expert, rows in zip(experts, expert_splits, strict=True):
        if rows > capacity:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + expert) % 2**63)
            kept.append(start + torch.randperm(rows, generator=generator)[:capacity].sort().values)
        else:
            kept.append(torch.arange(start, start + rows))
        start += rows
    return torch.cat(kept), [min(rows, capacity) for rows in expert_splits]
