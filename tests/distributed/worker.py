"""What a rank does in the distributed tests: build a run, train a few updates, hand back what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.tables.expert_places import ExpertPlaces


@dataclass(frozen=True)
class Part:
    """What one rank holds of one whole tensor. cut_dim: None if it holds all of it. blocks: see ``layout.Piece``."""

    tensor: Tensor
    cut_dim: int | None
    blocks: int
    tensor_rank: int


@dataclass
class Outcome:
    """One rank's account of a training.

    start, end: what it held before and after. frozen: the same at the switch and after every update of stage 2.
    routes: experts of each micro-batch of stage 2. tables: sha256 of the routing table in each update of stage 2.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    start: dict[str, Part] = field(default_factory=dict)
    end: dict[str, Part] = field(default_factory=dict)
    frozen: list[dict[str, Part]] = field(default_factory=list)
    routes: list[Tensor] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)


@contextmanager
def engine_of(run: RunConfig) -> Iterator[Any]:
    """An :class:`Engine` over the processes of this test.

    Experts that are placed by load have one that falls with their number in the first layer, and rises in the next.
    """
    from stablemoe_ds.config.batch_plan import batch_plan
    from stablemoe_ds.distributed.groups import Groups, start_world, stop_world
    from stablemoe_ds.training.engine import Engine
    from stablemoe_ds.training.sharded_weights import build_model

    world = start_world(timeout_minutes=1.0)
    groups = Groups(world, run.parallel.tensor, run.parallel.expert, run.parallel.sequence)
    placement = groups.placement
    if run.parallel.expert_placement == "load":
        load_LN = [range(run.moe.experts)[:: 1 if layer % 2 else -1] for layer in range(len(run.moe.layers))]
        places = ExpertPlaces.by_load(load_LN, groups.expert, run.parallel.replicated_experts)
        placement = replace(placement, places=places)
    model = build_model(run, run.model.vocab_size or 0, placement)
    yield Engine(run, batch_plan(run, world.size), groups, model)
    stop_world()


def share(batch: Batch, groups: Any) -> Batch:
    """A data rank's sequences of a global micro-batch, or its part of them."""
    mine = batch.map(lambda whole: whole.chunk(groups.reading_size)[groups.reading_rank])
    return mine.part(groups.sequence_rank, groups.sequence)


def train(
    run: RunConfig,
    weights: dict[str, Tensor] | None,
    batches: Sequence[Sequence[Batch]],
    switch: int,
    table: Any = None,
) -> Outcome:
    """One update for each entry of ``batches``, a list of global micro-batches; stage 2 from update ``switch`` on.

    weights: whole tensors to start from; None: as the run itself starts. table: of the layers that follow one from the
    first update.
    """
    from stablemoe_ds.moe.routing_pass import view_of
    from stablemoe_ds.routing.fixed import TableRouting, freeze
    from stablemoe_ds.routing.source import LEARNED, routes_of
    from stablemoe_ds.training.routed_batch import RoutedBatch
    from stablemoe_ds.training.sharded_weights import gathered

    outcome = Outcome()
    with engine_of(run) as engine:
        groups, device = engine.groups, engine.groups.world.device
        routes = TableRouting(table, device) if table else LEARNED
        if weights is not None:
            set_weights(engine, weights)
        outcome.start = parts(engine)
        for step, micro_batches in enumerate(batches):
            if step == switch:
                engine.freeze_distilled()
                with gathered(engine.model.distilled_routers):
                    routes = freeze(engine.model.distilled_routers, run.moe.top_k, tuple(run.moe.learned_layers))
                routes = TableRouting(routes.table.joined_to(table), device) if table else routes
                outcome.frozen.append(parts(engine))
            mine = [share(batch, groups).map(lambda whole: whole.to(device)) for batch in micro_batches]
            engine.set_learning_rate(run.optimizer.lr)
            sums = engine.accumulate([RoutedBatch(batch) for batch in mine], routes, step).totals()
            engine.update()
            outcome.steps.append(
                {
                    "loss": sums.loss / max(1, sums.scored),
                    "balance": sums.balance / max(1, sums.real),
                    "distill": sums.distill / max(1, sums.real),
                    "norm": engine.gradient_norm(),
                    "counts": sums.counts_LN,
                    "dropped": sums.dropped,
                }
            )
            if step >= switch:
                outcome.routes += [torch.stack([*routes_of(view_of(batch), routes).values()]).cpu() for batch in mine]
                outcome.frozen.append(parts(engine))
                if routes.table is not None:
                    outcome.tables.append(routes.table.sha256)
        outcome.end = parts(engine)
    return outcome


@torch.no_grad()
def set_weights(engine: Any, weights: dict[str, Tensor]) -> None:
    from stablemoe_ds.checkpoint.fp32_state import WEIGHT, Fp32State
    from stablemoe_ds.model.layout import pieces, shape_of

    fp32, groups = Fp32State(engine.deepspeed), engine.groups
    values: dict[torch.nn.Parameter, Tensor] = {}
    for piece in pieces(engine.model, groups.tensor):
        whole = values.setdefault(piece.parameter, torch.zeros(shape_of(piece.parameter)))
        piece.select(whole).copy_(piece.local_of(weights[piece.name], groups.tensor_rank, groups.tensor))
    for parameter, value in values.items():
        fp32.write(parameter, WEIGHT, value)


def parts(engine: Any) -> dict[str, Part]:
    """fp32 master weights this rank knows, by canonical name; rounded, they must be what the model computes with."""
    from stablemoe_ds.checkpoint.fp32_state import WEIGHT, Fp32State
    from stablemoe_ds.model.layout import pieces
    from stablemoe_ds.training.sharded_weights import gathered

    fp32, groups, found = Fp32State(engine.deepspeed), engine.groups, {}
    whole = {p: fp32.read(p, WEIGHT) for p in engine.model.parameters()}
    with gathered([engine.model]):
        for p, master in whole.items():
            assert torch.equal(master.to(p), p), "the master weight is not what the model computes with"
    for piece in pieces(engine.model, groups.tensor):
        value = piece.select(whole[piece.parameter]).to("cpu", copy=True)
        found[piece.name] = Part(value, piece.cut_dim, piece.cut_blocks, groups.tensor_rank)
    return found


def assemble(ranks: Sequence[dict[str, Part]]) -> dict[str, Tensor]:
    """Whole tensors from the parts of all ranks. Raises AssertionError if two ranks hold different copies."""
    wholes: dict[str, Tensor] = {}
    for name in {name: None for held in ranks for name in held}:
        held: dict[int, Part] = {}
        for part in (rank[name] for rank in ranks if name in rank):
            key = part.tensor_rank if part.cut_dim is not None else 0
            assert torch.equal(held.setdefault(key, part).tensor, part.tensor), f"ranks disagree on {name}"
        wholes[name] = _joined([held[key] for key in sorted(held)])
    return wholes


def _joined(parts: list[Part]) -> Tensor:
    dim, blocks = parts[0].cut_dim, parts[0].blocks
    if dim is None:
        return parts[0].tensor
    cut = [part.tensor.chunk(blocks, dim) for part in parts]
    return torch.cat([rank[block] for block in range(blocks) for rank in cut], dim)
