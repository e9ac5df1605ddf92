"""Routers by the names the configuration has for them."""

from __future__ import annotations

import pkgutil

from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.routing.distilled import DistilledRouter
from stablemoe_ds.routing.hashed import HashRouter
from stablemoe_ds.routing.router import Router


def make_router(
    moe: MoEConfig,
    hidden_size: int,
    heads: int,
    vocab: int,
    positions: int,
    eos_id: int | None = None,
    follows: bool = False,
) -> Router:
    """The router ``moe.router`` names, uninitialised.

    heads, positions: of a distilled transformer. eos_id: see :class:`DistilledRouter`.
    follows: it weighs experts that a table has chosen, and has nothing to choose by: no distilled router, no bias, and
    no centroids where its gate needs none.
    Raises ValueError for a name that has no experts to choose from.
    """
    facts = moe.facts
    if facts.made_by is None:
        raise ValueError(f"router {moe.router} has no experts to choose from")
    distilled = None
    if facts.distilled and not follows:
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
    made_by: type[Router] = pkgutil.resolve_name(f"stablemoe_ds.routing.{facts.made_by}")
    if not follows:
        return made_by.from_config(moe, hidden_size, distilled)
    router = (made_by if moe.gate_facts.affinity else HashRouter).from_config(moe, hidden_size, None)
    for name in [name for name, _ in router.named_buffers()]:  # what keeps choices in balance
        router.register_buffer(name, None)
    return router
