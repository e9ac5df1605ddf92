"""Watching a router over a text: how often each id was sent to each expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablemoe_ds.checkpoint.attached import check_corpora, token_counts_of
from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.loader import EvalLoader
from stablemoe_ds.data.run_data import EvalSet
from stablemoe_ds.data.table_corpus import text_digest
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.inference import inference
from stablemoe_ds.evaluation.on_checkpoint import eval_text, loaded
from stablemoe_ds.evaluation.trained_model import TrainedModel
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.moe.routing_pass import view_of
from stablemoe_ds.progress_bar import progress_bar
from stablemoe_ds.routing.fixed import TableRouting, freeze, freeze_balanced
from stablemoe_ds.routing.routes import SumOverRanks
from stablemoe_ds.routing.source import RouteSource, routes_of
from stablemoe_ds.tables.builders import how_made, of_run
from stablemoe_ds.tables.observed import explained, observed_table
from stablemoe_ds.tables.table import RoutingTable


def count_routes(
    model: StableMoEGPT,
    batches: Iterable[Batch],
    routes: RouteSource,
    sum_over_ranks: SumOverRanks,
    device: torch.device | str,
) -> NDArray[np.int64]:
    """int64 [L, V, N]: real tokens by MoE layer, id and expert; a token counts once for each expert it was sent to.

    batches, routes, sum_over_ranks: as in :func:`evaluate`. Tokens that no expert serves are not counted.
    """
    vocab, experts = model.vocab_size, model.run_config.moe.experts
    total_LC = torch.zeros(len(model.moe_layers), vocab * experts, dtype=torch.int64, device=device)
    with inference(model):
        for cpu_batch in batches:
            batch = cpu_batch.to(device)
            ids_T1 = batch.ids.transpose(0, 1).reshape(-1, 1)
            layers = model(batch, routes_of(view_of(batch), routes)).layers
            for count_C, layer in zip(total_LC, layers, strict=True):
                cell_TK = ids_T1 * experts + layer.expert_TK
                count_C += torch.bincount(cell_TK[layer.expert_TK >= 0], minlength=vocab * experts)
    counted: Tensor = sum_over_ranks(total_LC)
    return counted.view(-1, vocab, experts).cpu().numpy()


def observe(
    checkpoint: Checkpoint, sources: Sequence[Source], max_load: float | None, max_tokens: int | None = None
) -> tuple[RoutingTable, list[float]]:
    """A table of what the model of a checkpoint does with a text, and the share of it that the table reproduces.

    Its own routing: the learned router in stage 1, the frozen one in stage 2. sources: prepared corpora, read whole, or
    ``max_tokens`` of them from the start. max_load: see :func:`observed_table`.
    Raises UserError for a model without experts and for a corpus that is missing or of another tokenizer.
    """
    moe = checkpoint.run.moe
    if not moe.facts.routed:
        raise UserError(f"checkpoint {checkpoint.path} has no router (moe.router {moe.router}): nothing to observe")
    check_corpora(checkpoint, sources)
    with loaded(checkpoint) as trained:
        text = eval_text(trained, sources, max_tokens)
        served_LVN = served_by_id(trained, text)
    expert_LVK = observed_table(served_LVN, moe.top_k, max_load)
    shares, origin = explained(served_LVN, expert_LVK), origin_of(checkpoint, sources)
    origin |= {"stage": checkpoint.progress.stage, "tokens": text.loader.dataset.tokens, "explained": shares}
    made = how_made("observed", options={"max_load": max_load}, **origin)
    return RoutingTable(expert_LVK, moe.experts, tuple(moe.layers), checkpoint.tokenizer, made), shares


def origin_of(checkpoint: Checkpoint, sources: Sequence[Source] = ()) -> dict[str, Any]:
    """What a table that is made of a checkpoint says of it, and of the text that was read, if one was."""
    read = text_digest(sources) if sources else ""
    return {**of_run(checkpoint.run, read), "step": checkpoint.progress.step}


def served_by_id(trained: TrainedModel, text: EvalSet) -> NDArray[np.int64]:
    """:func:`count_routes` of a model as it was trained, with a progress bar."""
    groups = trained.groups
    batches, routes = _shown(text.loader), trained.trained_with
    return count_routes(trained.model, batches, routes, groups.sum_over_data_ranks, groups.world.device)


def _shown(loader: EvalLoader) -> Iterator[Batch]:
    """Its batches, with a progress bar."""
    with progress_bar("observing", len(loader)) as advance:
        for batch in loader:
            yield batch
            advance(1)


def frozen(checkpoint: Checkpoint, max_load: float | None, trained_on: Sequence[Source] = ()) -> RoutingTable:
    """The table that a checkpoint follows, or that a switch would freeze now; with ``max_load`` under that limit.

    trained_on: the run's training text, where it still is, to be named in the table. A table that was given to the run
    keeps what it says of itself. Raises UserError if the router has no table: it is not distilled, or its distilled
    router sees more than ids.
    """
    table, moe, origin = checkpoint.table(), checkpoint.run.moe, origin_of(checkpoint, trained_on)
    if table is not None and max_load is None and checkpoint.progress.stage == 2:
        if table.made.get("builder", "frozen") != "frozen":  # it was given to the run
            return table
        return replace(table, made={**table.made, **origin, "step": checkpoint.progress.switched_at, **table.made})
    if moe.top_k > 1 and max_load is not None:
        raise UserError(
            f"--max-load: checkpoint {checkpoint.path} has top_k {moe.top_k}, but the limited choice of a distilled "
            "router is of one expert: use 'stablemoe table build balanced' on its table"
        )
    if max_load is None and moe.facts.table_from == "scores and counts":
        max_load = moe.table_load
    with loaded(checkpoint) as trained:
        routers = trained.model.distilled_routers
        if not routers or not all(router.is_table for router in routers):
            raise UserError(
                f"checkpoint {checkpoint.path} has no distilled router of ids alone (moe.router {moe.router}): "
                "'stablemoe table build observed' makes a table of any router"
            )
        blocks, tokenizer = tuple(moe.learned_layers), checkpoint.tokenizer
        if max_load is not None:
            learned = freeze_balanced(routers, blocks, token_counts_of(checkpoint), max_load, tokenizer, **origin).table
        else:
            routing = freeze(routers, moe.top_k, blocks, tokenizer, **origin)
            assert isinstance(routing, TableRouting)
            learned = routing.table
    return learned if table is None or not moe.table_layers else learned.joined_to(table.only(moe.table_layers))
