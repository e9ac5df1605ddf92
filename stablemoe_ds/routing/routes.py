"""What a router decides, as values that are passed on, never stored.

Names of tensors and arrays end in their shape, one letter a dimension. A letter means one thing in the whole package:

A  routed (token, choice) pairs of this rank, sorted by expert
B  sequences of a micro-batch
C  consecutive parts that a micro-batch's tokens are cut into for dispatch
D  hidden size
E  experts of this rank
F  inner width of an expert
G  ranks of the expert-parallel group
H  records of the probe set over a run (its history)
I  columns of a row, or inputs of a matrix
J  ids that are split over several rows of a table
K  experts (choices) of a token
L  MoE layers
M  micro-batches of an update
N  experts of a layer, over all ranks
O  outputs of a matrix
P  tokens of the probe set
Q  rows that split ids have besides their own
R  rows that have arrived at this rank, sorted by expert
S  positions of a sequence
T  tokens of this rank's micro-batch in megatron-core's order, sequence first: t = s * B + b
U  blocks of queries or keys in attention
V  vocabulary
W  ranks of the run
X  expert-parallel groups of the run
Y  places for experts, over the ranks of an expert-parallel group
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]
"""Adds a tensor up over all data-parallel ranks; the identity in a single process."""

NOT_ROUTED = -1
"""Expert index of a token that no expert serves: padding."""

KnownRoutes = Mapping[int, Tensor]
"""Experts of a call's tokens, int64 [T, K], by the number of the block, for the MoE layers whose choice is made before
the call. The routers of all other layers decide, from hidden states."""
NOTHING_KNOWN: KnownRoutes = MappingProxyType({})
"""Every router decides."""


@dataclass(frozen=True)
class TokenView:
    """The tokens of one micro-batch as a router sees them.

    ids_BS: int64 [B, S]; real_T: bool [T], False at padding. whole_BS: ids of the whole sequences, of which ``ids_BS``
    are those from position ``first`` on (sequence parallelism); None: ``ids_BS`` are all.
    """

    ids_BS: Tensor  # noqa: N815
    real_T: Tensor  # noqa: N815
    whole_BS: Tensor | None = None  # noqa: N815
    first: int = 0


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
