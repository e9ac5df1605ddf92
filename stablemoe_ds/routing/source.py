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
from stablemoe_ds.routing.fixed import FrozenRouters, TableRouting, freeze, freeze_balanced, hash_table
from stablemoe_ds.routing.routes import NOTHING_KNOWN, KnownRoutes, TokenView
from stablemoe_ds.tables.builders import of_run
from stablemoe_ds.tables.given import given_table
from stablemoe_ds.tables.table import RoutingTable


class Learned:
    """The model's own routers decide, from hidden states: stage 1, and routers that are never fixed."""

    blocks: tuple[int, ...] = ()
    table = None
    looks_back = False

    def __call__(self, ids_BS: Tensor) -> KnownRoutes:
        """No routes are known beforehand."""
        return NOTHING_KNOWN


LEARNED = Learned()
FixedSource = TableRouting | FrozenRouters
RouteSource = Learned | FixedSource
"""A function from ids int64 [B, S] to the routes of all layers, of none, or of those that follow a table while the
others learn.

blocks: of the layers whose routes it gives. table: the :class:`RoutingTable` it looks them up in, where it is one.
looks_back: whether ids before a token join the choice.
"""


def routes_of(tokens: TokenView, routes: RouteSource) -> KnownRoutes:
    """What ``routes`` says of a micro-batch, which may be a part of its sequences.

    Most tables know an id by itself; frozen routers, and tables that split ids, look at the ids before it, which may be
    in another rank's part.
    """
    if tokens.whole_BS is None or not routes.looks_back:
        return routes(tokens.ids_BS)
    sequences, length = tokens.ids_BS.shape
    rows = slice(tokens.first * sequences, (tokens.first + length) * sequences)
    return {block: expert_TK[rows] for block, expert_TK in routes(tokens.whole_BS).items()}


@dataclass(frozen=True)
class RouteMaker:
    """Makes the source of routes of one model.

    routers: the distilled router of each MoE layer that has one. token_counts: gives int64 [V], how often the training
    text has each id; called for tables that depend on it. tokenizer: fingerprint to write into a table. build: makes
    the table that the run names by a builder; collective. whole: in this context the routers' parameters, which ZeRO 3
    keeps in parts, can be read; collective there. text: digest of the training text, to write into a table.
    """

    run: RunConfig
    routers: Sequence[DistilledRouter]
    token_counts: Callable[[], NDArray[np.int64]]
    tokenizer: str
    device: torch.device | str = "cpu"
    build: Callable[[], RoutingTable] | None = None
    whole: Callable[[], AbstractContextManager[object]] = nullcontext
    text: str = ""

    @property
    def can_freeze(self) -> bool:
        """Whether the routing of this run is fixed at some time."""
        return self.run.moe.facts.fixed or two_stages(self.run)

    @cached_property
    def given(self) -> RoutingTable | None:
        """The table in a file that the run follows or starts from, or None. Raises UserError if it does not fit."""
        moe = self.run.moe
        if moe.table_file is None:
            return None
        table = given_table(
            moe.table_file,
            experts=moe.experts,
            top_k=moe.top_k,
            blocks=tuple(moe.table_blocks),
            vocab_size=self.run.model.vocab_size,
            tokenizer=self.tokenizer,
            key=f"moe.{moe.table_key}",
        )
        if moe.start_table is not None and table.split is not None:
            raise UserError(
                f"moe.start_table: {moe.table_file} splits {len(table.split.ids_J)} ids over several rows by the id "
                "before them, but a router starts with one vector an id: expected a table that splits none"
            )
        return table

    def named(self) -> RoutingTable:
        """The table that the run names, to follow or to start from; collective where the run builds it.

        Raises UserError for a file that does not fit, and for a builder where tables are not built; ValueError if it
        names none.
        """
        moe = self.run.moe
        if self.given is not None:
            return self.given
        if moe.table_builder is None:
            raise ValueError(f"moe.{moe.table_key} of this run names no table")
        if self.build is None:
            raise UserError(
                f"moe.{moe.table_key}: the table of builder '{moe.table_builder}' has not been built: expected a "
                "checkpoint that contains it; training builds it when it starts, so train this run first, or name a "
                "table file"
            )
        return self.build()

    def check(self) -> None:
        """Raise UserError for a table in a file that the run cannot follow, before anything is written or trained."""
        _ = self.given

    def frozen(self, followed: RoutingTable | None = None, step: int | None = None) -> FixedSource:
        """What the run follows if its routing is fixed now.

        followed: the table of the layers that follow one already, where some do. step: updates made, to write into the
        table.
        Raises ValueError if it never is, UserError for a table in a file that does not fit.
        """
        moe, blocks = self.run.moe, tuple(self.run.moe.learned_layers)
        if not self.can_freeze:
            raise ValueError(f"router {moe.router} of this run is never fixed")
        if moe.facts.fixed:
            return TableRouting(self._from_start(), self.device)
        origin = of_run(self.run, self.text) | ({} if step is None else {"step": step})
        with self.whole():
            learned: FixedSource = (
                freeze_balanced(self.routers, blocks, self.token_counts(), moe.table_load, self.tokenizer, **origin)
                if moe.facts.needs_counts
                else freeze(self.routers, moe.top_k, blocks, self.tokenizer, **origin)
            )
        if not moe.table_layers:
            return learned
        followed = self._from_start() if followed is None else followed
        assert learned.table is not None  # of word routers, which the configuration asks for
        return TableRouting(learned.table.joined_to(followed.only(moe.table_layers)), self.device)

    def learning(self, followed: RoutingTable | None = None) -> RouteSource:
        """What the run follows while routers learn: the table of the layers that follow one, where some do.

        followed: what the run follows already; layers that are not in it begin with the run's table.
        Raises UserError for a table in a file that does not fit.
        """
        blocks = self.run.moe.table_layers
        if not blocks:
            return LEARNED
        if followed is None or not set(blocks) <= set(followed.blocks):
            followed = self._from_start()
        return TableRouting(followed.only(blocks), self.device)

    def _from_start(self) -> RoutingTable:
        """The table of the layers that follow one from the first update on."""
        moe = self.run.moe
        if moe.needs_table:
            return self.named()
        return hash_table(moe, self.token_counts(), self.run.seed, self.tokenizer, **of_run(self.run, self.text))

    def departures(self, followed: RoutingTable | None) -> list[str]:
        """Warnings for a run that continues along ``followed`` while the file it names holds another table."""
        if followed is None or not self.run.moe.needs_table:
            return []
        goes_on = f"the run continues along table {followed.sha256[:12]} of its checkpoint"
        try:
            given = self.given
        except UserError as error:
            return [f"WARNING: {line}; {goes_on}" for line in str(error).splitlines()]
        if given is None or not set(given.blocks) <= set(followed.blocks):
            return []  # where layers begin to follow a table, it is the run's
        if given.sha256 == followed.only(given.blocks).sha256:
            return []
        return [f"WARNING: moe.table: {self.run.moe.table} holds table {given.sha256[:12]}; {goes_on}"]

    def restored(self, stage: int, table: RoutingTable | None) -> RouteSource:
        """What a checkpoint of this stage follows: the table in it, before all else."""
        if stage == 1:
            return self.learning(table)
        return TableRouting(table, self.device) if table is not None else self.frozen()
