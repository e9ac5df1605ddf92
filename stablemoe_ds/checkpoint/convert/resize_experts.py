"""More experts or fewer, as functions on whole tensors by name.

Replication makes r copies of each expert: expert e becomes e * r to e * r + r - 1. With a frozen table the
model computes the same as before: id v goes to copy v mod r of each of its experts. Where routers still choose, equal
copies would tie and the first would get every token, so the centroids of the copies are moved apart by a thousandth of
their size, which changes the output by about as much. Merging takes the mean of r neighbours. It undoes replication;
otherwise it is a starting point for further training.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor

from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.errors import UserError

_EXPERT = re.compile(r"(.+\.experts\.)(\d+)(\..+)")
_ROWS = ("centroids", "bias_N", "scale_N", "threshold_N")
"""Last part of the names of tensors that have a row for each expert."""
APART = 1e-3
"""How far copies of a centroid are moved apart, relative to its size."""


def check_replication(moe: MoEConfig, stage: int) -> None:
    """Raise UserError if copies of an expert would change what the router means.

    moe: of the smaller model. stage: 2 once the distilled routers are frozen, into a table if they see single ids.
    """
    reason, choosing = None, stage == 1 or (moe.facts.distilled and moe.distilled.kind != "word")
    if moe.facts.experts_choose:
        reason = "each copy would choose the same tokens"
    elif moe.gate_facts.over_all_experts:
        reason = "a softmax over copies gives each a share of the gate only"
    elif choosing and moe.top_k > 1:
        reason = "the best experts of a token would be copies of one"
    if reason is not None:
        raise UserError(
            f"moe.router: got '{moe.router}' with top_k {moe.top_k}: its experts cannot be copied: {reason}"
        )


def replicate(
    weights: dict[str, Tensor], times: int, seed: int | None, along_table: Collection[str] = ()
) -> dict[str, Tensor]:
    """Make ``times`` copies of each expert.

    seed: of the offsets that move centroids apart; None: no offsets. along_table: names of MoE layers that follow a
    table: their routers do not choose, and their centroids stay together.
    """
    grown: dict[str, Tensor] = {}
    for name, value in weights.items():
        match = _EXPERT.fullmatch(name)
        if match:
            first = int(match[2]) * times
            grown |= {f"{match[1]}{copy}{match[3]}": value.clone() for copy in range(first, first + times)}
        elif name.rsplit(".", 1)[-1] in _ROWS:
            grown[name] = value.repeat_interleave(times, 0)
            if seed is not None and value.ndim == 2 and name.partition(".router.")[0] not in along_table:
                noise = torch.randn(grown[name].shape, generator=torch.Generator().manual_seed(seed))
                grown[name] = grown[name] + noise * (APART * value.norm(dim=1).mean() / value.shape[1] ** 0.5)
        else:
            grown[name] = value
    return grown


def merge(weights: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """Replace each ``times`` neighbouring experts by their mean."""
    merged: dict[str, Tensor] = {}
    groups: dict[str, list[Tensor]] = {}
    for name, value in weights.items():
        match = _EXPERT.fullmatch(name)
        if match:
            groups.setdefault(f"{match[1]}{int(match[2]) // times}{match[3]}", []).append(value)
        elif name.rsplit(".", 1)[-1] in _ROWS:
            merged[name] = value.unflatten(0, (-1, times)).mean(1)
        else:
            merged[name] = value
    return merged | {name: torch.stack(values).mean(0) for name, values in groups.items()}
