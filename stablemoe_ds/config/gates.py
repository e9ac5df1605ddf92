"""What is known of a gate, the weight of what an expert adds to a token, before anything is built. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class GateFacts:
    """What follows from the kind of gate alone.

    neutral: (top_k, experts) -> what the gates of a token add up to when all experts are equally good.
    affinity: the gate is a function of the affinity of token and expert, so it needs a centroid for each expert.
    over_all_experts: the gate is a share of the affinity to all experts, so a copy of an expert takes part of it away.
    """

    neutral: Callable[[int, int], float]
    affinity: bool = True
    over_all_experts: bool = False


GATES: dict[str, GateFacts] = {
    "sigmoid": GateFacts(neutral=lambda top_k, _experts: top_k / 2),
    "normalized": GateFacts(neutral=lambda top_k, _experts: 1.0 if top_k > 1 else 0.5),
    "softmax": GateFacts(neutral=lambda top_k, experts: top_k / experts, over_all_experts=True),
    "one": GateFacts(neutral=lambda top_k, _experts: float(top_k), affinity=False),
}
