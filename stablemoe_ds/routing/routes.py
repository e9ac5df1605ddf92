"""What a router decides, as values that are passed on, never stored.

Shape suffixes used throughout: T tokens of this rank's micro-batch in megatron-core's order (sequence first:
t = s * B + b), S sequence positions, B sequences, D hidden size, N experts of a layer, K experts per token,
L MoE layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]
"""Adds a tensor up over all data-parallel ranks; the identity in a single process."""

NOT_ROUTED = -1
"""Expert index of a token that no expert serves: padding."""


@dataclass(frozen=True)
class TokenView:
    """The tokens of one micro-batch as a router sees them.

    ids_BS: int64 [B, S]; real_T: bool [T], False at padding.
    """

    ids_BS: Tensor  # noqa: N815
    real_T: Tensor  # noqa: N815


@dataclass(frozen=True)
class Routes:
    """Where each token goes, and what the choice costs.

    expert_TK: int64 [T, K], ``NOT_ROUTED`` at padding.
    gate_TK: fp32 [T, K], factor on what the expert adds; carries gradient.
    loss_sums: auxiliary losses by name, unweighted, summed over this rank's real tokens; carry gradient.
    counts_N: int64 [N], real tokens (times K) of this rank that chose each expert, before any capacity cut.
    agree: int64 scalar, real tokens for which the distilled router names the same experts; None where unknown.
    statistic_N: fp32 [N], what the router's ``after_update`` wants to know of this micro-batch; None for most.
    """

    expert_TK: Tensor  # noqa: N815
    gate_TK: Tensor  # noqa: N815
    loss_sums: dict[str, Tensor]
    counts_N: Tensor  # noqa: N815
    agree: Tensor | None = None
    statistic_N: Tensor | None = None  # noqa: N815


@dataclass(frozen=True)
class LayerReport:
    """What one MoE layer did in one forward call; everything but ``loss_sums`` is detached.

    served_N is int64 [N]: tokens of this rank by the expert they chose; dropped counts (token, choice) pairs beyond
    capacity; unserved counts this rank's real tokens that no expert was chosen for. statistic_N: as in :class:`Routes`.
    """

    block: int
    expert_TK: Tensor  # noqa: N815
    served_N: Tensor  # noqa: N815
    dropped: Tensor
    unserved: Tensor
    loss_sums: dict[str, Tensor]
    agree: Tensor | None
    statistic_N: Tensor | None = None  # noqa: N815


@dataclass
class RoutingPass:
    """Travels with one forward call through the blocks: what MoE layers need in, what they report out.

    fixed_LTK: int64 [L, T, K], routes known beforehand; None lets each layer's learned router decide.
    plans: one ``moe.plan.LayerPlan`` a layer, made from those routes beforehand; None lets each layer make its own.
    draw: seed of this call's random decisions (which tokens exceed capacity); equal on all ranks.
    reports: one entry a MoE layer, in the order of the layers.
    """

    tokens: TokenView
    fixed_LTK: Tensor | None  # noqa: N815
    draw: int = 0
    plans: Sequence[Any] | None = None
    reports: list[LayerReport] = field(default_factory=list)
