"""The registry of routers: everything that is known of one before anything is built. No torch here.

A new router is a class in a file of ``stablemoe_ds/routing`` and an entry here; the names that ``moe.router`` accepts,
costs, rules, conversions and the builder follow from the entry. docs/method.md describes each router, and a test
compares its table with the facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class RouterFacts:
    """How a router behaves over a run.

    made_by: its class as "module:class" below ``stablemoe_ds.routing``; None where nothing is routed.
    layer: what stands in an MoE layer: "experts"; a dense stack of all their sublayers, one after another ("deep") or
    side by side ("wide"); "none" if there is no such layer.
    gate: its own gate, a key of ``gates.GATES``.
    table_from: what fixes its routes. "scores": those of a distilled router, which learns from it until the switch.
    "scores and counts": the same under a load limit, which needs to know how often each id occurs. "counts": these
    alone, before the first update. "file": the table in a file. None: nothing does, it chooses to the end.
    balance_weight: default weight of its balance loss.
    balanced_by_bias: a bias of each expert, which follows the load by ``moe.bias_step``, joins the choice.
    one_expert: gives a token one expert only.
    experts_choose: experts choose tokens, so that a token has several experts, one or none.
    by_micro_batch: in training a choice depends on the other tokens of the rank's micro-batch, and so on the layout.
    """

    made_by: str | None = None
    layer: Literal["experts", "deep", "wide", "none"] = "experts"
    gate: str = "sigmoid"
    table_from: Literal["scores", "scores and counts", "counts", "file"] | None = None
    balance_weight: float = 0.0
    balanced_by_bias: bool = False
    one_expert: bool = False
    experts_choose: bool = False
    by_micro_batch: bool = False

    @property
    def routed(self) -> bool:
        """Tokens are spread over experts; otherwise the layer, if there is one, is dense."""
        return self.layer == "experts"

    @property
    def fixed(self) -> bool:
        """Follows a table from the first update."""
        return self.table_from in ("counts", "file")

    @property
    def distilled(self) -> bool:
        """A router of token ids learns from it, and is frozen when stage 1 ends."""
        return self.table_from in ("scores", "scores and counts")

    @property
    def needs_counts(self) -> bool:
        """Its table depends on how often each id occurs."""
        return self.table_from in ("counts", "scores and counts")


ROUTERS: dict[str, RouterFacts] = {
    "stablemoe": RouterFacts("stablemoe:StableMoERouter", table_from="scores", balance_weight=0.3),
    "stablemoe_balanced": RouterFacts(
        "stablemoe:StableMoERouter", table_from="scores and counts", balance_weight=0.3, one_expert=True
    ),
    "stablemoe_stage1": RouterFacts("stablemoe:StableMoERouter", balance_weight=0.3),
    "base": RouterFacts("base_layers:BaseLayersRouter", one_expert=True, by_micro_batch=True),
    "base_fixed": RouterFacts(
        "base_layers:BaseLayersRouter", table_from="scores", one_expert=True, by_micro_batch=True
    ),
    "switch": RouterFacts("switch:SwitchRouter", gate="softmax", balance_weight=0.01),
    "hash": RouterFacts("hashed:HashRouter", gate="one", table_from="counts"),
    "table": RouterFacts("hashed:HashRouter", gate="one", table_from="file"),
    "topk": RouterFacts("topk:TopKRouter", gate="normalized", balanced_by_bias=True),
    "expert_choice": RouterFacts(
        "expert_choice:ExpertChoiceRouter", gate="softmax", experts_choose=True, by_micro_batch=True
    ),
    "dense": RouterFacts(layer="none"),
    "dense_deeper": RouterFacts(layer="deep"),
    "dense_wider": RouterFacts(layer="wide"),
}

if TYPE_CHECKING:
    RouterName = str
else:
    RouterName = Literal[tuple(ROUTERS)]
"""A key of :data:`ROUTERS`; pydantic refuses any other."""
