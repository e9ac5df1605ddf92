"""Where the routes of a run come from: one value, made here from a run or from a checkpoint, and passed along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablemoe_ds.config.rules import two_stages
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError
from stablemoe_ds.routing.distilled import DistilledRouter
from stablemoe_ds.routing.fixed import FrozenRouters, TableRouting, freeze, freeze_balanced, hash_routing
from stablemoe_ds.tables.given import given_table
from stablemoe_ds.tables.table import RoutingTable


class Learned:
    """The model's own routers decide, from hidden states: stage 1, and routers that are never fixed."""

    fixed = False
    table = None

    def __call__(self, ids_BS: Tensor) -> None:
        """No routes are known beforehand."""
        return


LEARNED = Learned()
FixedSource = TableRouting | FrozenRouters
RouteSource = Learned | FixedSource
"""A function from ids int64 [B, S] to experts int64 [L, T, K], or to None where the learned routers decide.

fixed: whether it gives routes. table: the :class:`RoutingTable` it looks them up in, where it is one.
"""


@dataclass(frozen=True)
class RouteMaker:
    """Makes the source of routes of one model.

    routers: the distilled router of each MoE layer. token_counts: gives int64 [V], how often the training text has
    each id; called for tables that depend on it. tokenizer: fingerprint to write into a table. build: makes the table
    that ``moe.table`` describes by the name of a builder; collective. whole: in this context the routers' parameters,
    which ZeRO 3 keeps in parts, can be read; collective there.
    """

    run: RunConfig
    routers: Sequence[DistilledRouter]
    token_counts: Callable[[], NDArray[np.int64]]
    tokenizer: str
    device: torch.device | str = "cpu"
    build: Callable[[], RoutingTable] | None = None
    whole: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def can_freeze(self) -> bool:
        """Whether the routing of this run is fixed at some time."""
        return self.run.moe.facts.fixed or two_stages(self.run)

    @cached_property
    def given(self) -> RoutingTable | None:
        """The table in a file that the run is to follow, or None. Raises UserError if it does not fit."""
        moe = self.run.moe
        if moe.table_file is None:
            return None
        return given_table(
            moe.table_file,
            experts=moe.experts,
            top_k=moe.top_k,
            blocks=tuple(moe.layers),
            vocab_size=self.run.model.vocab_size,
            tokenizer=self.tokenizer,
        )

    def check(self) -> None:
        """Raise UserError for a table in a file that the run cannot follow, before anything is written or trained."""
        _ = self.given

    def frozen(self) -> FixedSource:
        """What the run follows if its routing is fixed now.

        Raises ValueError if it never is, UserError for a table in a file that does not fit.
        """
        moe, blocks = self.run.moe, tuple(self.run.moe.layers)
        if not self.can_freeze:
            raise ValueError(f"router {moe.router} of this run is never fixed")
        if self.given is not None:
            return TableRouting(self.given, self.device)
        if moe.table_builder is not None:
            if self.build is None:
                raise ValueError(f"the table of this run is built from its training text ({moe.table}), not here")
            return TableRouting(self.build(), self.device)
        if moe.facts.fixed:
            return hash_routing(moe, self.token_counts(), self.run.seed, self.tokenizer, self.device)
        with self.whole():
            if moe.facts.needs_counts:
                return freeze_balanced(self.routers, blocks, self.token_counts(), moe.table_load, self.tokenizer)
            return freeze(self.routers, moe.top_k, blocks, self.tokenizer)

    def departures(self, followed: RoutingTable | None) -> list[str]:
        """Warnings for a run that continues along ``followed`` while the file it names holds another table."""
        if followed is None:
            return []
        goes_on = f"the run continues along table {followed.sha256[:12]} of its checkpoint"
        try:
            given = self.given
        except UserError as error:
            return [f"WARNING: {line}; {goes_on}" for line in str(error).splitlines()]
        if given is None or given.sha256 == followed.sha256:
            return []
        return [f"WARNING: moe.table: {self.run.moe.table} holds table {given.sha256[:12]}; {goes_on}"]

    def restored(self, stage: int, table: RoutingTable | None) -> RouteSource:
        """What a checkpoint of this stage follows: the table in it, which was frozen then, before all else."""
        if stage == 1:
            return LEARNED
        return TableRouting(table, self.device) if table is not None else self.frozen()
