"""What travels with one forward call: routes and plans to the MoE layers, their reports back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.moe.plan import LayerPlan
from stablemoe_ds.routing.routes import KnownRoutes, TokenView


def view_of(batch: Batch) -> TokenView:
    """The tokens of a batch as routers see them."""
    return TokenView(batch.ids, batch.real_T, batch.whole, batch.first)


@dataclass(frozen=True)
class LayerReport:
    """What one MoE layer did in one forward call; everything but ``loss_sums`` is detached.

    served_N is int64 [N]: tokens of this rank by the expert they chose; dropped counts (token, choice) pairs beyond
    capacity; unserved counts this rank's real tokens that no expert was chosen for. statistic_N: as in :class:`Routes`.
    gate_TK: fp32, the weight of what each expert adds; None where the layer does not say.
    """

    block: int
    expert_TK: Tensor  # noqa: N815
    served_N: Tensor  # noqa: N815
    dropped: Tensor
    unserved: Tensor
    loss_sums: dict[str, Tensor]
    agree: Tensor | None
    statistic_N: Tensor | None = None  # noqa: N815
    gate_TK: Tensor | None = None  # noqa: N815


@dataclass
class RoutingPass:
    """Travels with one forward call through the blocks: what MoE layers need in, what they report out.

    known: routes that are known beforehand.
    plans: by block, made from those routes beforehand; a layer without one makes its own.
    seed: seed of this call's random decisions (which tokens exceed capacity); equal on all ranks.
    counts_LN: fp32 [L, N], tokens (times K) by MoE layer and expert that balance losses go by: of the whole update,
    over all ranks. None: each layer counts those of this call.
    only_choices: number of MoE layers if the call is made to learn what they choose, and ends with the last choice;
    0 if its output is wanted.
    reports: one entry a MoE layer, in the order of the layers.
    """

    tokens: TokenView
    known: KnownRoutes = field(default_factory=dict)
    seed: int = 0
    plans: Mapping[int, LayerPlan] = field(default_factory=dict)
    counts_LN: Tensor | None = None  # noqa: N815
    only_choices: int = 0
    reports: list[LayerReport] = field(default_factory=list)

    @property
    def at_last_choice(self) -> bool:
        """Whether the MoE layer that comes now is the last whose choice is wanted."""
        return self.only_choices == len(self.reports) + 1

    @property
    def ended(self) -> bool:
        """Whether all choices are made that the call was made for."""
        return self.only_choices > 0 and self.only_choices == len(self.reports)
