"""The batches of a run on their way into updates: as the loader gives them, or planned ahead along a table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from stablemoe_ds.config.schema import ParallelConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.distributed.faults import at_most
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.routing.source import RouteSource
from stablemoe_ds.tables.expert_places import ExpertPlaces
from stablemoe_ds.training.planner import Planner
from stablemoe_ds.training.routed_batch import RoutedBatch


class Feed:
    """Gives each update its micro-batches. Only a table can be looked up ahead of an update."""

    def __init__(self, groups: Groups, parallel: ParallelConfig, places: ExpertPlaces | None = None) -> None:
        """``places``: as in :class:`~stablemoe_ds.distributed.placement.LayerPlacement`."""
        self._groups, self._parallel, self._places = groups, parallel, places
        self._loader: Iterator[list[Batch]] = iter(())
        self._ready: Iterator[list[RoutedBatch]] = iter(())
        self._planner: Planner | None = None

    def start(self, loader: Iterator[list[Batch]], routes: RouteSource) -> None:
        """Give what ``loader`` has, in place of anything before. Collective."""
        self.close()
        self._loader = loader
        self.follow(routes)

    def follow(self, routes: RouteSource) -> None:
        """Let the updates to come follow other routes, those that are planned already as well. Collective."""
        if self._planner is not None:
            self._loader = chain(self._planner.close(), self._loader)
            self._planner = None
        if routes.table is None:
            self._ready = ([RoutedBatch(batch) for batch in step] for step in self._loader)
        else:
            self._planner = Planner(self._loader, routes.table, self._groups, self._parallel, self._places)
            self._ready = iter(self._planner)

    def next(self) -> list[RoutedBatch]:
        """The micro-batches of the next update. Raises TimeoutError if that takes longer than a collective may."""
        with at_most(self._groups.world.timeout.total_seconds(), "reading the next batch"):
            return next(self._ready)

    def close(self) -> None:
        """Stop planning."""
        if self._planner is not None:
            self._planner.close()
            self._planner = None
