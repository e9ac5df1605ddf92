"""Settings of the section ``moe`` that a run does not look at, because they are for another router or gate.

One file is meant to serve many routers, so such a setting is not an error, but a run says that it has no effect. A
table that no layer follows is refused (``rules.check``): a run without it is not what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from stablemoe_ds.config.messages import show
from stablemoe_ds.config.moe_section import MoEConfig

Condition = Callable[[MoEConfig], bool]


def _has_layer(moe: MoEConfig) -> bool:
    return moe.facts.layer != "none"


def _routed(moe: MoEConfig) -> bool:
    return moe.facts.routed


def _balanced(moe: MoEConfig) -> bool:
    return moe.facts.balance_weight > 0


def _distilled(moe: MoEConfig) -> bool:
    return moe.facts.distilled


def _centroids(moe: MoEConfig) -> bool:
    return moe.has_centroids


LOOKED_AT: dict[str, Condition] = {
    "placement": _has_layer,
    "experts": _has_layer,
    "sublayers": _has_layer,
    "ffn_hidden_size": _has_layer,
    "top_k": _routed,
    "shared_experts": _routed,
    "capacity_factor": _routed,
    "gate": _routed,
    "equal_experts": _routed,
    "balance_weight": _balanced,
    "balance_over": lambda moe: _balanced(moe) and moe.balance_weight > 0,
    "distill_weight": _distilled,
    "router_input": _centroids,
    "centroid_gain": _centroids,
    "distilled.kind": _distilled,
    "distilled.dim": lambda moe: _distilled(moe) and moe.distilled.kind != "transformer",
    "distilled.layers": lambda moe: _distilled(moe) and moe.distilled.kind == "transformer",
    "distilled.bigram_start": lambda moe: _distilled(moe) and moe.distilled.kind == "bigram",
    "distilled.lr_scale": _distilled,
    "hash_table": lambda moe: moe.facts.table_from == "counts",
    "table": lambda moe: moe.needs_table,
    "table_load": lambda moe: moe.facts.table_from == "scores and counts",
    "bias_step": lambda moe: moe.facts.balanced_by_bias,
}
"""When a setting has an effect. One that is not listed always has, or is refused where it has none."""


def idle_keys(moe: MoEConfig) -> set[str]:
    """Dotted keys of the settings that change nothing of this run."""
    return {f"moe.{name}" for name, looked_at in LOOKED_AT.items() if not looked_at(moe)}


def idle_settings(moe: MoEConfig) -> dict[str, object]:
    """Those of them that do not have their default, by dotted key.

    ``router_input`` is left out: a run that is resolved has it filled in.
    """
    usual = MoEConfig.model_construct(balance_weight=moe.facts.balance_weight)
    names = [key.removeprefix("moe.") for key in sorted(idle_keys(moe) - {"moe.router_input"})]
    given = {name: attrgetter(name)(moe) for name in names}
    return {f"moe.{name}": value for name, value in given.items() if value != attrgetter(name)(usual)}


def idle_text(moe: MoEConfig) -> str | None:
    """One line that names them, or None if there are none."""
    found = ", ".join(f"{key} {show(value)}" for key, value in idle_settings(moe).items())
    return f"without effect on router '{moe.router}': {found}" if found else None
