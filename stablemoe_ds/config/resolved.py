"""A run with everything that depends on its tokenizer, its processes and the checkpoint it continues from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stablemoe_ds.config.batch_plan import BatchPlan, batch_plan
from stablemoe_ds.config.rules import check, with_document_end, with_vocabulary
from stablemoe_ds.config.schema import RunConfig

FORMER: dict[str, dict[str, Any]] = {"model": {"embedding": "scaled"}, "moe": {"router_input": "raw"}}
"""Defaults as they were when the first checkpoints were written, where they have changed since."""


@dataclass(frozen=True)
class ResolvedRun:
    """run: with ``model.vocab_size`` filled in. batch: how an update's tokens are cut over ``world_size`` processes."""

    run: RunConfig
    world_size: int
    batch: BatchPlan

    @property
    def vocab_size(self) -> int:
        return self.run.model.vocab_size or 0


def saved_run(tree: Mapping[str, Any]) -> RunConfig:
    """The run that a checkpoint names; what it leaves out had the default of its time.

    A table that no layer follows, which the first versions accepted and ignored, is left out.

    tree: its settings as JSON has them. Raises pydantic's ValidationError if this version does not know them.
    """
    sections = {name: FORMER[name] | tree[name] for name in FORMER if isinstance(tree.get(name), dict)}
    run = RunConfig.model_validate({**tree, **sections})
    if not run.moe.needs_table:
        run = run.model_copy(update={"moe": run.moe.model_copy(update={"table": None})})
    return settled(run)


def settled(run: RunConfig, embedding: str | None = None, router_input: str | None = None) -> RunConfig:
    """The run with ``model.embedding`` and ``moe.router_input``, where it leaves them open, as given or by default."""
    model = {"embedding": run.model.embedding or embedding or "plain"}
    usual = "raw" if model["embedding"] == "scaled" else "normalized"
    moe = {"router_input": run.moe.router_input or router_input or usual}
    return run.model_copy(update={"model": run.model.model_copy(update=model), "moe": run.moe.model_copy(update=moe)})


def as_begun(run: RunConfig, before: RunConfig | None) -> RunConfig:
    """The run with what :func:`settled` fills in from the run that it goes on from; None: it is a new one.

    Weights that were trained with one scale of the embedding make no sense with the other, and their shapes would not
    give that away.
    """
    if before is None:
        return settled(run)
    return settled(run, before.model.embedding, before.moe.router_input if before.moe.facts.routed else None)


def resolve(
    run: RunConfig, world_size: int, tokenizer: tuple[int, int | None] | None, before: RunConfig | None = None
) -> ResolvedRun:
    """Check a run against every rule and resolve it.

    tokenizer: how many ids it has, and the one that ends a document; None where the run names no tokenizer. before: the
    run of the checkpoint it goes on from, if there is one. Raises UserError for a run that cannot work.
    """
    run = as_begun(run, before)
    check(run, world_size)
    size, eos_id = tokenizer if tokenizer is not None else (run.model.vocab_size or 0, None)
    run = with_document_end(with_vocabulary(run, size), eos_id)
    return ResolvedRun(run, world_size, batch_plan(run, world_size))
