"""What ``stablemoe table simulate`` says: one line of JSON an update, and all updates in one small table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.config.resolved import ResolvedRun
from stablemoe_ds.config.text_table import aligned
from stablemoe_ds.tables.expert_load import max_loads
from stablemoe_ds.tables.expert_places import ExpertPlaces
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
    by_number = ExpertPlaces.by_number(len(load_LN), table.experts, layout.expert)
    expert_LN = _served_by_expert(summary.served_LWE, layout.places or by_number)
    # What ranks serve over all updates follows from what experts do, wherever the run has them.
    replicated = (layout.places or by_number).replicated
    compared = {"number": by_number, "load": ExpertPlaces.by_load(load_LN, layout.expert)}
    if replicated:
        compared["load, replicated"] = ExpertPlaces.by_load(load_LN, layout.expert, replicated)
    busiest = {name: places.rank_loads(expert_LN).max(-1).tolist() for name, places in compared.items()}
    return {
        "run": resolved.run.name,
        "table": table.sha256,
        "updates": summary.updates,
        "tokens_per_update": resolved.batch.tokens_per_step,
        "ranks": layout.ranks,
        "nodes": layout.nodes,
        "expert_parallel": layout.expert,
        "experts_of_a_rank": (layout.places or by_number).of_each_rank,
        "expert_placement": resolved.run.parallel.expert_placement,
        "replicated_experts": replicated,
        "mean_rank": int(summary.served_LWE.sum()) / max(1, summary.updates) / layout.ranks,
        "memory_of_rows": int(summary.worst["most_rows"]) * layout.row_bytes,
        "learned_layers": [block for block in resolved.run.moe.layers if block not in table.blocks],
        "figures": {name: {"mean": summary.mean(name), "worst": summary.worst[name]} for name in FIGURES},
        "layers": [
            {"block": block, "max_load": expert, "max_rank_load": {name: busiest[name][at] for name in busiest}}
            for at, (block, expert) in enumerate(zip(table.blocks, max_loads(list(expert_LN)), strict=True))
        ],
    }


def _served_by_expert(served_LWE: NDArray[np.int64], places: ExpertPlaces) -> NDArray[np.int64]:
    """int64 [L, N]: rows of each expert, wherever it stands."""
    layers, places_of_all = places.expert_LY.shape
    served_LY = served_LWE.reshape(layers, -1, places_of_all).sum(1)
    served_LN = np.zeros((layers, places.expert_LY.max() + 1), np.int64)
    for served_N, served_Y, expert_Y in zip(served_LN, served_LY, places.expert_LY, strict=True):
        np.add.at(served_N, expert_Y.clip(0), served_Y)  # nothing is served where no expert is
    return served_LN


def summary_text(facts: dict[str, Any]) -> str:
    """The same for a person."""
    rows = [["of an update", "mean", "worst"]]
    for name, text in FIGURES.items():
        figure = facts["figures"][name]
        rows.append([text, *(_shown(name, figure[which]) for which in ("mean", "worst"))])
    copied = facts["replicated_experts"]
    more = [f"and {copied} replicated"] if copied else []
    loads = [["MoE layer at block", "busiest expert", "busiest rank, experts by number", "by load", *more]]
    for layer in facts["layers"]:
        ranks = (f"{load:.2f}" for load in layer["max_rank_load"].values())
        loads.append([str(layer["block"]), f"{layer['max_load']:.2f}", *ranks])
    each, learned = facts["ranks"] // facts["nodes"], ", ".join(map(str, facts["learned_layers"]))
    return "\n".join(
        [
            f"{facts['updates']:,} updates of {facts['tokens_per_update']:,} tokens along table {facts['table'][:12]}",
            f"{facts['ranks']} ranks, {each} a node; {facts['expert_parallel']} of them share "
            f"the experts, {facts['experts_of_a_rank']} each, placed by {facts['expert_placement']}"
            + (f", {copied} of them on every rank" if copied else ""),
            "",
            aligned(rows, right=(1, 2)),
            "",
            f"A rank serves {facts['mean_rank']:,.0f} rows an update in the mean. The most that one holds at once, of "
            f"one layer, take {facts['memory_of_rows'] / 1e6:,.2f} MB.",
            "",
            "Load over all updates, as a multiple of the mean",
            aligned(loads, right=range(1, len(loads[0]))),
            *([f"Layers that learn where tokens go, at blocks {learned}, are not in any of this."] if learned else []),
        ]
    )


def _shown(name: str, value: float) -> str:
    if name == "idle":
        return f"{value:.1%}"
    if name == "capacity":
        return f"{value:.2f}"
    return f"{value / 1e6:,.2f}" if "MB" in FIGURES[name] else f"{value:,.0f}"
