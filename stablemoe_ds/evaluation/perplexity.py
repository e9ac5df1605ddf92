"""Perplexity in which every scored token of every rank counts exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.distributed.figures import Figures
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.inference import inference
from stablemoe_ds.model.gpt import ForwardOutput, StableMoEGPT
from stablemoe_ds.moe.routing_pass import view_of
from stablemoe_ds.routing.routes import SumOverRanks
from stablemoe_ds.routing.source import RouteSource, routes_of
from stablemoe_ds.tables.expert_load import max_loads


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a data set, over all ranks.

    loss: nats per token. tokens: how many predictions it is the mean of.
    agreement: share of real tokens, over all MoE layers, that the distilled router sends where the learned one
    does, of those that have both; None if none of them decided.
    served_LN: real tokens (times K) by MoE layer and expert.
    """

    loss: float
    tokens: int
    agreement: float | None
    served_LN: tuple[tuple[int, ...], ...]  # noqa: N815

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where a float cannot hold it."""
        return _exp(self.loss)

    @property
    def load(self) -> list[float]:
        """Largest over mean load of each MoE layer; 1 is even."""
        return max_loads(self.served_LN)


def word_perplexity(evaluation: Evaluation, words: int) -> float:
    """Perplexity per word of the text that was cut into ``evaluation.tokens`` tokens."""
    if words < 1:
        raise UserError(f"perplexity per word needs the number of words in the text, at least 1; got {words}")
    return _exp(evaluation.loss * evaluation.tokens / words)


def evaluate(
    model: StableMoEGPT,
    batches: Iterable[Batch],
    routes: RouteSource,
    sum_over_ranks: SumOverRanks,
    device: torch.device | str,
) -> Evaluation:
    """Mean loss, load and agreement of a model.

    batches: this rank's share; all ranks must bring the same number, as MoE layers exchange tokens in each.
    routes: what decides the experts where routers do not.
    sum_over_ranks: adds a float64 tensor up over the data-parallel ranks.
    Raises UserError if no rank has a scored token.
    """
    figures = Figures()
    with inference(model):
        for cpu_batch in batches:
            batch = cpu_batch.to(device)
            _add(figures, batch, model(batch, routes_of(view_of(batch), routes)))
    totals = figures.totals(sum_over_ranks)
    scored, compared = totals.count("scored"), totals.count("compared")
    if not scored:
        raise UserError("nothing to evaluate: the data set has no token to predict; is it shorter than two tokens?")
    return Evaluation(
        loss=totals.number("loss") / scored,
        tokens=scored,
        agreement=totals.number("agreed") / compared if compared else None,
        served_LN=tuple(tuple(int(n) for n in row) for row in totals.rows("served_LN")),
    )


def _add(figures: Figures, batch: Batch, output: ForwardOutput) -> None:
    """What one batch adds. compared: (token, layer) pairs of which it is known whether the routers agree."""
    # where, not a product: a NaN at padding must not reach the sum.
    loss_BS = torch.where(batch.scored, output.loss_BS.double(), 0.0)
    agreed = [layer.agree for layer in output.layers if layer.agree is not None]
    figures.add(loss=loss_BS.sum(), scored=batch.scored.sum(), compared=batch.real.sum() * len(agreed), agreed=agreed)
    if output.layers:
        figures.add(served_LN=torch.stack([layer.served_N for layer in output.layers]))


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
