"""Hash layers (Roller et al. 2021) and whatever else follows a table from the first update."""

from __future__ import annotations

from torch import Tensor

from stablemoe_ds.routing.distilled import DistilledRouter
from stablemoe_ds.routing.gates import Gate, OneGate
from stablemoe_ds.routing.router import CentroidRouter
from stablemoe_ds.routing.routes import Routes, SumOverRanks, TokenView


class HashRouter(CentroidRouter):
    """Follows given routes. Its own gate is 1, and then it has nothing to learn; others have centroids to gate by."""

    def __init__(
        self,
        hidden_size: int,
        experts: int,
        top_k: int,
        normalize: bool,
        distilled: DistilledRouter | None = None,
        gate: Gate | None = None,
    ) -> None:
        gate = gate or OneGate()
        super().__init__(hidden_size, experts, top_k, normalize, distilled, gate)
        if gate.constant:
            self.register_parameter("centroids", None)

    def forward(
        self, hidden_TD: Tensor, tokens: TokenView, fixed_TK: Tensor | None, sum_over_ranks: SumOverRanks
    ) -> Routes:
        """As in :class:`Router`; raises ValueError without ``fixed_TK``."""
        if fixed_TK is None:
            raise ValueError("a router that follows a table decides nothing by itself: pass the routes of its table")
        return self.follow(hidden_TD, fixed_TK, tokens)
