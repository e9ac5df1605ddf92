"""Watching a router over a text: how often each id was sent to each expert."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from stablemoe_ds.checkpoint.attached import check_corpora, find_corpora, token_counts_of
from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.config.batch import batch_plan
from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.run_data import eval_set
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.inference import inference
from stablemoe_ds.evaluation.on_checkpoint import loaded
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.fixed import TableRouting, freeze, freeze_balanced
from stablemoe_ds.routing.routes import SumOverRanks
from stablemoe_ds.routing.source import LEARNED, RouteSource
from stablemoe_ds.tables.builders import how_made
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

    routes, batches, sum_over_ranks: as in :func:`evaluate`. Tokens that no expert serves are not counted.
    """
    vocab, experts = model.vocab_size, model.run_config.moe.experts
    total_LC = torch.zeros(len(model.moe_layers), vocab * experts, dtype=torch.int64, device=device)
    with inference(model):
        for cpu_batch in batches:
            batch = cpu_batch.to(device)
            ids_T1 = batch.ids.transpose(0, 1).reshape(-1, 1)
            layers = model(batch, routes(batch.ids)).layers
            for count_C, layer in zip(total_LC, layers, strict=True):
                cell_TK = ids_T1 * experts + layer.expert_TK
                count_C += torch.bincount(cell_TK[layer.expert_TK >= 0], minlength=vocab * experts)
    counted: Tensor = sum_over_ranks(total_LC)
    return counted.view(-1, vocab, experts).cpu().numpy()


def observe(path: str, corpora: list[str], max_load: float | None) -> tuple[RoutingTable, list[float]]:
    """A table of what the model of a checkpoint does with a text, and the share of it that the table explains.

    Its own routing: the learned router where that decides, the frozen one in stage 2. corpora: prepared ones; none:
    the run's training text. max_load: see :func:`observed_table`. Raises UserError for a model without experts.
    """
    checkpoint = Checkpoint.open(path)
    moe, tokenizer = checkpoint.run.moe, checkpoint.tokenizer
    if not moe.facts.routed:
        raise UserError(f"checkpoint {checkpoint.path} has no router ({moe.router}): nothing to observe")
    sources = [Source(path=corpus) for corpus in corpora] or find_corpora(checkpoint, checkpoint.run.data.train)
    check_corpora(checkpoint, sources)  # before anything slow begins
    with loaded(checkpoint) as trained:
        groups, stage = trained.groups, checkpoint.progress.stage
        data = eval_set(sources, trained.run, batch_plan(trained.run, groups.world.size).micro_batch, groups)
        routes = trained.routes if stage == 2 else LEARNED
        batches = tqdm(data.loader, desc="observing", unit="batch", disable=None)
        served_LVN = count_routes(trained.model, batches, routes, groups.sum_over_data_ranks, groups.world.device)
    expert_LVK = observed_table(served_LVN, moe.top_k, max_load)
    shares = explained(served_LVN, expert_LVK)
    made = how_made(
        "observed",
        options={"max_load": max_load},
        router=moe.router,
        step=checkpoint.progress.step,
        explained=shares,
    )
    return RoutingTable(expert_LVK, moe.experts, tuple(moe.layers), tokenizer, made), shares


def frozen(path: str, max_load: float | None) -> RoutingTable:
    """The table that a checkpoint follows, or that a switch would freeze now; with ``max_load`` under that limit.

    Raises UserError if the router has no table: it is not distilled, or its distilled router sees more than ids.
    """
    checkpoint = Checkpoint.open(path)
    table = checkpoint.table()
    if table is not None and max_load is None:
        return table
    with loaded(checkpoint) as trained:
        run, routers, where = trained.run, trained.model.distilled_routers, trained.checkpoint.path
        if not routers or not all(router.is_table for router in routers):
            raise UserError(
                f"checkpoint {where} has no distilled router of ids alone (moe.router {run.moe.router}): "
                "'stablemoe table build observed' makes a table of any router"
            )
        if max_load is None and run.moe.facts.needs_counts:
            max_load = run.moe.table_load
        blocks, tokenizer = tuple(run.moe.layers), trained.checkpoint.tokenizer
        if max_load is None:
            routing = freeze(routers, run.moe.top_k, blocks, tokenizer)
            assert isinstance(routing, TableRouting)
            return routing.table
        if run.moe.top_k > 1:
            raise UserError(
                f"--max-load: checkpoint {where} has top_k {run.moe.top_k}, but the limited choice of a distilled "
                "router is of one expert: use 'stablemoe table build balanced' on its table"
            )
        counts = token_counts_of(checkpoint)
        return freeze_balanced(routers, blocks, counts, max_load, tokenizer).table
