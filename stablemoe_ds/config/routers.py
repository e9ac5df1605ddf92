"""What there is to know of each router before anything is built. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RouterName = Literal[
    "stablemoe",
    "stablemoe_balanced",
    "stablemoe_stage1",
    "base",
    "base_fixed",
    "switch",
    "hash",
    "topk",
    "expert_choice",
    "dense",
    "dense_deeper",
    "dense_wider",
]


@dataclass(frozen=True)
class RouterFacts:
    """How a router behaves over a run.

    routed: tokens are spread over experts; otherwise the layer, if there is one, is dense.
    learned: has centroids that the model learns, for choosing, gating or both.
    distilled: a router of token ids learns beside it, and is frozen when stage 1 ends.
    fixed: follows a table from the first update.
    balance_weight: default weight of its balance loss.
    """

    routed: bool = True
    learned: bool = True
    distilled: bool = False
    fixed: bool = False
    balance_weight: float = 0.0


ROUTERS: dict[str, RouterFacts] = {
    "stablemoe": RouterFacts(distilled=True, balance_weight=0.3),
    "stablemoe_balanced": RouterFacts(distilled=True, balance_weight=0.3),
    "stablemoe_stage1": RouterFacts(balance_weight=0.3),
    "base": RouterFacts(),
    "base_fixed": RouterFacts(distilled=True),
    "switch": RouterFacts(balance_weight=0.01),
    "hash": RouterFacts(learned=False, fixed=True),
    "topk": RouterFacts(),
    "expert_choice": RouterFacts(),
    "dense": RouterFacts(routed=False, learned=False),
    "dense_deeper": RouterFacts(routed=False, learned=False),
    "dense_wider": RouterFacts(routed=False, learned=False),
}
