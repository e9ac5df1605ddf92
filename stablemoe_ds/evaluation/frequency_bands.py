"""How well a model predicts common and rare ids, and how much its experts add for them.

Ids are put into bands by how often the training text has them, each band with about the same share of that text: the
first has a few ids, the last most of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablemoe_ds.checkpoint.attached import check_corpora, find_corpora, token_counts_of
from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.config.schema import Source
from stablemoe_ds.config.text_table import aligned
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.distributed.figures import Figures
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.inference import inference
from stablemoe_ds.evaluation.on_checkpoint import eval_text, loaded
from stablemoe_ds.model.gpt import ForwardOutput, StableMoEGPT
from stablemoe_ds.moe.routing_pass import view_of
from stablemoe_ds.routing.routes import SumOverRanks
from stablemoe_ds.routing.source import RouteSource, routes_of


@dataclass(frozen=True)
class Band:
    """One band of ids.

    ids: how many. share: of the training text. tokens: predicted ones of these ids. loss: their mean, nats; None if
    there are none. gates: mean gate of tokens *read*, not predicted, of these ids, by MoE layer. gates_of_experts: the
    same by MoE layer and expert; None where an expert serves none.
    """

    ids: int
    share: float
    tokens: int
    loss: float | None
    gates: list[float | None]
    gates_of_experts: list[list[float | None]]


def bands_of(token_counts: NDArray[np.int64], bands: int) -> NDArray[np.int64]:
    """int64 [V]: the band of each id, 0 for the commonest. An id that fills more than a band leaves the next one empty.

    token_counts: int64 [V]; ids of equal count in their order, those that do not occur in the last band.
    """
    order = np.argsort(-token_counts, kind="stable")
    ahead = np.cumsum(token_counts[order]) - token_counts[order]
    found = np.empty(len(token_counts), dtype=np.int64)
    found[order] = np.minimum(ahead * bands // max(int(token_counts.sum()), 1), bands - 1)
    return found


def measure_bands(
    model: StableMoEGPT,
    batches: Iterable[Batch],
    routes: RouteSource,
    sum_over_ranks: SumOverRanks,
    device: torch.device | str,
    token_counts: NDArray[np.int64],
    bands: int,
) -> list[Band]:
    """Loss and gates of a model by band. batches, routes, sum_over_ranks: as in :func:`perplexity.evaluate`.

    token_counts: int64 [V], of the training text, by which the bands are made.
    """
    of_id, figures = bands_of(token_counts, bands), Figures()
    band_V = torch.from_numpy(of_id).to(device)
    with inference(model):
        for cpu_batch in batches:
            batch = cpu_batch.to(device)
            output = model(batch, routes_of(view_of(batch), routes))
            _add(figures, batch, output, band_V, bands, model.run_config.moe.experts)
    totals = figures.totals(sum_over_ranks)
    tokens, loss = (np.array(totals.rows(name)) for name in ("tokens", "loss"))
    served, gate = (np.array(totals.rows(name)) for name in ("served", "gate"))  # [layers, bands, N]
    total = max(int(token_counts.sum()), 1)
    return [
        Band(
            ids=int((of_id == band).sum()),
            share=float(token_counts[of_id == band].sum() / total),
            tokens=int(tokens[band]),
            loss=_mean(loss[band], tokens[band]),
            gates=[_mean(gate[layer, band].sum(), served[layer, band].sum()) for layer in range(len(gate))],
            gates_of_experts=[list(map(_mean, gate[layer, band], served[layer, band])) for layer in range(len(gate))],
        )
        for band in range(bands)
    ]


def _add(figures: Figures, batch: Batch, output: ForwardOutput, band_V: Tensor, bands: int, experts: int) -> None:
    """What one batch adds."""
    predicted = band_V[batch.labels[batch.scored]]
    losses = output.loss_BS[batch.scored].double()
    figures.add(
        tokens=torch.bincount(predicted, minlength=bands), loss=torch.bincount(predicted, losses, minlength=bands)
    )
    read_T1 = band_V[batch.ids].transpose(0, 1).reshape(-1, 1)
    served, gate = [], []
    for layer in output.layers:
        assert layer.gate_TK is not None
        sent_TK = layer.expert_TK >= 0
        cells = (read_T1 * experts + layer.expert_TK)[sent_TK]
        served.append(torch.bincount(cells, minlength=bands * experts).view(bands, experts))
        gate.append(torch.bincount(cells, layer.gate_TK[sent_TK].double(), bands * experts).view(bands, experts))
    if served:
        figures.add(served=torch.stack(served), gate=torch.stack(gate))


def _mean(total: float, count: float) -> float | None:
    return float(total / count) if count else None


def bands_of_checkpoints(paths: list[str], corpora: list[str], bands: int) -> tuple[list[dict[str, Any]], str]:
    """Bands of one checkpoint, or of two in comparison: (facts, text).

    corpora: prepared ones; none: each run's validation text. Bands are made by the counts of the first one's training
    text. In stage 1 the learned router decides.
    Raises UserError for checkpoints of different tokenizers and for a corpus that is missing or of another tokenizer.
    """
    if bands < 1:
        raise UserError(f"--bands {bands}: expected 1 or more")
    checkpoints = [Checkpoint.open(path) for path in paths]
    first = checkpoints[0]
    if other := [one for one in checkpoints if one.tokenizer != first.tokenizer]:
        raise UserError(
            f"{other[0].path} has another tokenizer than {first.path}: their losses are of different pieces"
        )
    counts = token_counts_of(first)
    facts = []
    for checkpoint in checkpoints:
        sources = [Source(path=corpus) for corpus in corpora] or find_corpora(checkpoint, checkpoint.run.data.valid)
        if not sources:
            raise UserError("the run names no validation text: name a prepared corpus with --data")
        check_corpora(checkpoint, sources)
        with loaded(checkpoint) as trained:
            groups, batches = trained.groups, eval_text(trained, sources).loader
            sums, device = groups.sum_over_data_ranks, groups.world.device
            found = measure_bands(trained.model, batches, trained.trained_with, sums, device, counts, bands)
        facts.append(
            {"checkpoint": str(checkpoint.path), "run": checkpoint.run.name, "bands": [asdict(band) for band in found]}
        )
    return facts, render_bands(facts)


def render_bands(facts: list[dict[str, Any]]) -> str:
    """A line for each band; with two checkpoints their losses and by how much the second one is lower."""
    two = len(facts) == 2
    head = [
        "band",
        "ids",
        "of the text",
        *(f"loss of {one['run']}" for one in facts),
        *(["second lower by"] if two else []),
    ]
    head += [f"gates of {one['run']}" for one in facts if one["bands"][0]["gates"]]
    rows = [head]
    for number, bands in enumerate(zip(*(one["bands"] for one in facts), strict=True)):
        losses = [band["loss"] for band in bands]
        row = [str(number + 1), f"{bands[0]['ids']:,}", f"{bands[0]['share']:.1%}", *map(_number, losses)]
        row += [_number(losses[0] - losses[1] if None not in losses else None)] if two else []
        row += [_gates(band) for band in bands if band["gates"]]
        rows.append(row)
    return aligned(rows, right=set(range(4 + 2 * two)))


def _gates(band: dict[str, Any]) -> str:
    """Mean gate of each MoE layer, and from which expert's to which one's."""
    texts = []
    for mean, of_experts in zip(band["gates"], band["gates_of_experts"], strict=True):
        known = [gate for gate in of_experts if gate is not None]
        texts.append(f"{mean:.3f} ({min(known):.3f} to {max(known):.3f})" if known else "-")
    return ", ".join(texts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
