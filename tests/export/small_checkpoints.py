"""Checkpoints of models that nobody has trained, as training would have written them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stablemoe_ds.checkpoint.reader import Progress
from stablemoe_ds.checkpoint.saver import write_share
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed.placement import LayerPlacement
from stablemoe_ds.evaluation.inference import inference
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.model.layout import pieces
from stablemoe_ds.routing.fixed import FrozenRouters, TableRouting
from stablemoe_ds.routing.source import LEARNED, RouteSource
from stablemoe_ds.run_directory.checkpoint_files import FORMAT, write_manifest
from stablemoe_ds.tables.table import RoutingTable
from tests.tables.texts import split_at_random

TWO_STAGES = ("stablemoe", "base_fixed")
FROM_THE_START = ("hash", "table")
SPLITTING = "split.safetensors"
"""The name of a table, here, that splits every other id."""


@dataclass(frozen=True)
class SavedModel:
    """A model, its checkpoint, and the table that it follows."""

    model: StableMoEGPT
    path: Path
    table: RoutingTable | None
    routes: RouteSource

    def logits(self, ids_BS: Tensor) -> Tensor:
        """fp32 [B, S, V], as this package computes them."""
        with inference(self.model):
            return self.model.logits(ids_BS, self.routes(ids_BS))


def save_model(run: RunConfig, vocab: int, stage: int, placement: LayerPlacement, folder: Path) -> SavedModel:
    """Build, move every weight, write. The table of a router that has one in this stage is random."""
    model = StableMoEGPT(run, vocab, placement)
    random = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for moved in [*model.parameters(), *model.router_state().values()]:
            moved.add_(torch.randn(moved.shape, generator=random) * 0.1)
    table = random_table(run, vocab).only(run.moe.table_layers) if run.moe.table_layers else None
    routes: RouteSource = TableRouting(table) if table else LEARNED
    if stage == 2 and run.moe.router in TWO_STAGES and run.moe.distilled.kind != "word":
        routes = FrozenRouters(model.distilled_routers, run.moe.top_k, tuple(run.moe.layers))
    elif run.moe.router in FROM_THE_START or (stage == 2 and run.moe.router in TWO_STAGES):
        table = random_table(run, vocab)
        routes = TableRouting(table)
    write_checkpoint(folder, run, vocab, whole_tensors(model), table, stage)
    return SavedModel(model, folder, table, routes)


def random_table(run: RunConfig, vocab: int) -> RoutingTable:
    scores_LVN = np.random.default_rng(5).random((len(run.moe.layers), vocab, run.moe.experts), dtype=np.float32)
    table = RoutingTable.from_scores(scores_LVN, run.moe.top_k, tuple(run.moe.layers))
    return split_at_random(table, list(range(1, vocab, 2)), 3) if run.moe.table == SPLITTING else table


def whole_tensors(model: StableMoEGPT) -> dict[str, Tensor]:
    """Every tensor that a checkpoint keeps, by canonical name."""
    weights = {piece.name: piece.select(piece.parameter).detach() for piece in pieces(model, 1)}
    return {name: tensor.contiguous() for name, tensor in (weights | model.router_state()).items()}


def write_checkpoint(
    folder: Path, run: RunConfig, vocab: int, tensors: dict[str, Tensor], table: RoutingTable | None, stage: int
) -> None:
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "progress": asdict(Progress(step=4, stage=stage)),
        "optimizer_steps": 4,
        "loss_scale": None,
        "tokenizer": "",
        "vocab_size": vocab,
        "run": run.model_dump(mode="json"),
        "started_in": "",
    }
    write_manifest(folder, manifest | write_share(folder, "0000", tensors, {}, table, {}))
