"""A run with what only its tokenizer and the number of its processes decide, worked out once."""

from __future__ import annotations

from dataclasses import dataclass

from stablemoe_ds.config.batch_plan import BatchPlan, batch_plan
from stablemoe_ds.config.rules import check, with_document_end, with_vocabulary
from stablemoe_ds.config.schema import RunConfig


@dataclass(frozen=True)
class ResolvedRun:
    """run: with ``model.vocab_size`` filled in. batch: how an update's tokens are cut over ``world_size`` processes."""

    run: RunConfig
    world_size: int
    batch: BatchPlan

    @property
    def vocab_size(self) -> int:
        return self.run.model.vocab_size or 0


def resolve(run: RunConfig, world_size: int, tokenizer: tuple[int, int | None] | None) -> ResolvedRun:
    """Check a run against every rule and resolve it.

    tokenizer: how many ids it has, and the one that ends a document; None where the run names no tokenizer.
    Raises UserError for a run that cannot work.
    """
    check(run, world_size)
    size, eos_id = tokenizer if tokenizer is not None else (run.model.vocab_size or 0, None)
    run = with_document_end(with_vocabulary(run, size), eos_id)
    return ResolvedRun(run, world_size, batch_plan(run, world_size))
