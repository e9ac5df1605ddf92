"""Routers by the names the configuration has for them."""

from __future__ import annotations

from stablemoe_ds.config.schema import MoEConfig
from stablemoe_ds.routing.base_layers import BaseLayersRouter
from stablemoe_ds.routing.distilled import DistilledRouter
from stablemoe_ds.routing.expert_choice import ExpertChoiceRouter
from stablemoe_ds.routing.hashed import HashRouter
from stablemoe_ds.routing.router import Router
from stablemoe_ds.routing.stablemoe import StableMoERouter
from stablemoe_ds.routing.switch import SwitchRouter
from stablemoe_ds.routing.topk import TopKRouter


def make_router(
    moe: MoEConfig, hidden_size: int, heads: int, vocab: int, positions: int, eos_id: int | None = None
) -> Router:
    """The router ``moe.router`` names, uninitialised.

    heads, positions: of a distilled transformer. eos_id: see :class:`DistilledRouter`.
    Raises ValueError for a name that has no experts to choose from.
    """
    shape = (hidden_size, moe.experts, moe.top_k, moe.router_input == "normalized")
    distilled = None
    if moe.facts.distilled:
        kind = moe.distilled
        distilled = DistilledRouter(
            kind.kind,
            vocab,
            moe.experts,
            dim=kind.dim,
            layers=kind.layers,
            width=hidden_size,
            heads=heads,
            positions=positions,
            bigram_start=kind.bigram_start,
            eos_id=eos_id,
        )
    match moe.router:
        case "stablemoe" | "stablemoe_balanced" | "stablemoe_stage1":
            return StableMoERouter(*shape, distilled)
        case "base" | "base_fixed":
            return BaseLayersRouter(*shape, distilled)
        case "switch":
            return SwitchRouter(*shape)
        case "topk":
            return TopKRouter(*shape, moe.bias_step)
        case "expert_choice":
            return ExpertChoiceRouter(*shape)
        case "hash":
            return HashRouter(moe.experts, moe.top_k)
        case _:
            raise ValueError(f"router {moe.router} has no experts to choose from")
