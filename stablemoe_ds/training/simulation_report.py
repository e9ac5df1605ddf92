"""What ``stablemoe table simulate`` says: one line of JSON an update, and all updates in one small table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.config.resolved import ResolvedRun
from stablemoe_ds.config.text_table import aligned
from stablemoe_ds.tables.expert_load import max_loads
from stablemoe_ds.tables.expert_places import order_by_load, rank_loads
from stablemoe_ds.tables.table import RoutingTable
from stablemoe_ds.training.simulation import Layout, SimulatedUpdate

FIGURES = {
    "busiest_rank": "rows of the busiest rank, over all layers",
    "most_rows": "most rows a rank serves at once",
    "capacity": "capacity factor that drops nothing",
    "idle": "idle, while the busiest rank of a group works",
    "inside": "MB between ranks of one node",
    "between": "MB between nodes",
    "busiest_pair": "MB between the two ranks that exchange most",
}
"""Figures of an update by name."""


def update_facts(update: SimulatedUpdate) -> dict[str, Any]:
    """All of an update, as JSON can hold it."""
    return {
        "update": update.number,
        "served": update.served_LWE.tolist(),
        "sent": update.sent_LXGG.tolist(),
        **{name: getattr(update, name) for name in FIGURES},
    }


@dataclass
class Summary:
    """Updates added up, so that none has to be kept."""

    updates: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FIGURES, 0.0))
    worst: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FIGURES, 0.0))
    served_LWE: NDArray[np.int64] | None = None  # noqa: N815

    def add(self, update: SimulatedUpdate) -> None:
        self.updates += 1
        for name in FIGURES:
            value = getattr(update, name)
            self.sums[name] += value
            self.worst[name] = max(self.worst[name], value)
        self.served_LWE = update.served_LWE + (0 if self.served_LWE is None else self.served_LWE)

    def mean(self, name: str) -> float:
        return self.sums[name] / max(1, self.updates)


def summary_facts(
    summary: Summary, resolved: ResolvedRun, table: RoutingTable, layout: Layout, load_LN: NDArray[np.float64]
) -> dict[str, Any]:
    """Everything but the updates themselves. load_LN: float64 [L, N], of the table on the training text."""
    assert summary.served_LWE is not None
    served_LXN = summary.served_LWE.reshape(len(table.blocks), -1, table.experts)
    by_number_LN = np.broadcast_to(np.arange(table.experts), load_LN.shape)
    expert_LN = np.empty_like(served_LXN.sum(1))
    order_LN = by_number_LN if layout.order_LN is None else layout.order_LN
    np.put_along_axis(expert_LN, order_LN, served_LXN.sum(1), axis=-1)
    # What ranks serve over all updates follows from what experts do, whichever of the two the run does.
    by_number, by_load = (
        rank_loads(expert_LN, order, layout.expert).max(-1).tolist()
        for order in (by_number_LN, order_by_load(load_LN, layout.expert))
    )
    return {
        "run": resolved.run.name,
        "table": table.sha256,
        "updates": summary.updates,
        "tokens_per_update": resolved.batch.tokens_per_step,
        "ranks": layout.ranks,
        "nodes": layout.nodes,
        "expert_parallel": layout.expert,
        "experts_of_a_rank": table.experts // layout.expert,
        "expert_placement": resolved.run.parallel.expert_placement,
        "mean_rank": int(summary.served_LWE.sum()) / max(1, summary.updates) / layout.ranks,
        "memory_of_rows": int(summary.worst["most_rows"]) * layout.row_bytes,
        "learned_layers": [block for block in resolved.run.moe.layers if block not in table.blocks],
        "figures": {name: {"mean": summary.mean(name), "worst": summary.worst[name]} for name in FIGURES},
        "layers": [
            {"block": block, "max_load": expert, "max_rank_load": {"number": number, "load": load}}
            for block, expert, number, load in zip(table.blocks, max_loads(expert_LN), by_number, by_load, strict=True)
        ],
    }


def summary_text(facts: dict[str, Any]) -> str:
    """The same for a person."""
    rows = [["of an update", "mean", "worst"]]
    for name, text in FIGURES.items():
        figure = facts["figures"][name]
        rows.append([text, *(_shown(name, figure[which]) for which in ("mean", "worst"))])
    loads = [["MoE layer at block", "busiest expert", "busiest rank, experts by number", "by load"]]
    for layer in facts["layers"]:
        ranks = (f"{layer['max_rank_load'][placement]:.2f}" for placement in ("number", "load"))
        loads.append([str(layer["block"]), f"{layer['max_load']:.2f}", *ranks])
    each, learned = facts["ranks"] // facts["nodes"], ", ".join(map(str, facts["learned_layers"]))
    return "\n".join(
        [
            f"{facts['updates']:,} updates of {facts['tokens_per_update']:,} tokens along table {facts['table'][:12]}",
            f"{facts['ranks']} ranks, {each} a node; {facts['expert_parallel']} of them share "
            f"the experts, {facts['experts_of_a_rank']} each, placed by {facts['expert_placement']}",
            "",
            aligned(rows, right=(1, 2)),
            "",
            f"A rank serves {facts['mean_rank']:,.0f} rows an update in the mean. The most that one holds at once, of "
            f"one layer, take {facts['memory_of_rows'] / 1e6:,.2f} MB.",
            "",
            "Load over all updates, as a multiple of the mean",
            aligned(loads, right=(1, 2, 3)),
            *([f"Layers that learn where tokens go, at blocks {learned}, are not in any of this."] if learned else []),
        ]
    )


def _shown(name: str, value: float) -> str:
    if name == "idle":
        return f"{value:.1%}"
    if name == "capacity":
        return f"{value:.2f}"
    return f"{value / 1e6:,.2f}" if "MB" in FIGURES[name] else f"{value:,.0f}"
