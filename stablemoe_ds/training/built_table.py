"""The table that a run builds from its training text when it begins: on one rank, for all."""

from __future__ import annotations

from collections.abc import Callable

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.table_corpus import table_corpus
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.distributed.together import of_first_rank
from stablemoe_ds.tables.builders import build_table
from stablemoe_ds.tables.table import RoutingTable


def built_table(
    run: RunConfig, vocab_size: int, tokenizer: Tokenizer | None, say: Callable[[str], None]
) -> RoutingTable:
    """The table of the builder that the run names, from the run's seed; the same on all ranks. Collective.

    Raises UserError on all ranks if the text cannot be read.
    """
    moe = run.moe
    assert moe.table_builder is not None

    def build() -> RoutingTable:
        say(f"building table {moe.table_builder} from the training text")
        return build_table(
            moe.table_builder or "",
            moe.table_options,
            table_corpus(run.data.train, tokenizer, vocab_size),
            experts=moe.experts,
            top_k=moe.top_k,
            blocks=moe.table_blocks,
            seed=run.seed,
        )

    return of_first_rank(build)
