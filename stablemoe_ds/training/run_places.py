"""The places of a run's experts on its ranks, by the load of the table that it follows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed.together import of_first_rank
from stablemoe_ds.errors import UserError
from stablemoe_ds.routing.source import RouteMaker
from stablemoe_ds.run_directory.checkpoint_files import saved_checkpoints
from stablemoe_ds.tables.expert_places import ExpertPlaces
from stablemoe_ds.tables.table import RoutingTable


def expert_places(
    run: RunConfig, counts_V: NDArray[np.int64], tokenizer: str, build: Callable[[], RoutingTable]
) -> ExpertPlaces | None:
    """Places as in :class:`LayerPlacement`; None where experts stand by number. The same on all ranks.

    Any places train the same model, so the table need not be the very one that the run turns out to follow: it is that
    of the newest checkpoint that can be read, or else what the run follows from its first update. A run that has yet
    to learn its table has none. counts_V: int64 [V], of the training text. tokenizer, build: as in :class:`RouteMaker`.
    Collective. Raises UserError for a table in a file that does not fit the run.
    """
    if not run.parallel.places_by_load:
        return None
    table = of_first_rank(partial(_saved_table, run)) if run.checkpoint.resume else None
    if table is None and run.moe.facts.fixed:
        table = RouteMaker(run, (), lambda: counts_V, tokenizer, build=build).frozen().table
    shape = (len(run.moe.layers), len(counts_V), run.moe.experts)
    if table is None or (len(table.blocks), table.vocab_size, table.experts) != shape:
        return None
    return ExpertPlaces.by_load(table.expert_load(counts_V), run.parallel.expert, run.parallel.replicated_experts)


def _saved_table(run: RunConfig) -> RoutingTable | None:
    """Of the newest checkpoint that can be read; whether the run may go on from it is found out later."""
    for path in saved_checkpoints(run.directory):
        try:
            return Checkpoint.at(path).table()
        except UserError:
            continue
    return None
