"""What is known of a gate, the weight of what an expert adds to a token, before anything is built. No torch here.

docs/method.md has the formulas; ``stablemoe_ds/routing/gates.py`` computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class GateFacts:
    """What follows from the kind of gate alone.

    neutral: (top_k, experts) -> what the gates of a token add up to when all affinities are 0.
    affinity: the gate is a function of the affinity of token and expert, so it needs a centroid for each expert.
    numbers: how many numbers it learns for each expert.
    own_only: part of what some routers are, and not to be combined with others.
    over_all_experts: the gate is a share of the affinity to all experts, so a copy of an expert takes part of it away.
    """

    neutral: Callable[[int, int], float]
    affinity: bool = True
    numbers: int = 0
    own_only: bool = False
    over_all_experts: bool = False


GATES: dict[str, GateFacts] = {
    "sigmoid": GateFacts(neutral=lambda top_k, _experts: top_k / 2),
    "doubled": GateFacts(neutral=lambda top_k, _experts: float(top_k)),
    "learned": GateFacts(neutral=lambda top_k, _experts: float(top_k), numbers=2),
    "one": GateFacts(neutral=lambda top_k, _experts: float(top_k), affinity=False),
    "normalized": GateFacts(neutral=lambda top_k, _experts: 1.0 if top_k > 1 else 0.5, own_only=True),
    "softmax": GateFacts(neutral=lambda top_k, experts: top_k / experts, own_only=True, over_all_experts=True),
}

if TYPE_CHECKING:
    GateName = str
else:
    GateName = Literal[("own", *(name for name, facts in GATES.items() if not facts.own_only))]
"""What ``moe.gate`` accepts."""
