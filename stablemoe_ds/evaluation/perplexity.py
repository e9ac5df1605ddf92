"""Perplexity in which every scored token of every rank counts exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.inference import inference
from stablemoe_ds.model.gpt import ForwardOutput, StableMoEGPT
from stablemoe_ds.routing.fixed import FixedRouting
from stablemoe_ds.routing.routes import SumOverRanks


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a data set, over all ranks.

    loss: nats per token. tokens: how many predictions it is the mean of.
    agreement: share of real tokens, over all MoE layers, that the distilled router sends where the learned one
    does; None if routing was fixed, or there is no MoE layer.
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
        return [max(served_N) * len(served_N) / max(sum(served_N), 1) for served_N in self.served_LN]


def word_perplexity(evaluation: Evaluation, words: int) -> float:
    """Perplexity per word of the text that was cut into ``evaluation.tokens`` tokens."""
    if words < 1:
        raise UserError(f"perplexity per word needs the number of words in the text, at least 1; got {words}")
    return _exp(evaluation.loss * evaluation.tokens / words)


def evaluate(
    model: StableMoEGPT,
    batches: Iterable[Batch],
    routing: FixedRouting | None,
    sum_over_ranks: SumOverRanks,
    device: torch.device | str,
) -> Evaluation:
    """Mean loss, load and agreement of a model.

    batches: this rank's share; all ranks must bring the same number, as MoE layers exchange tokens in each.
    routing: what decides the experts; None: the learned routers (stage 1).
    sum_over_ranks: adds a float64 tensor up over the data-parallel ranks.
    Raises UserError if no rank has a scored token.
    """
    layers, experts = len(model.moe_layers), model.run_config.moe.experts
    total = torch.zeros(4 + layers * experts, dtype=torch.float64, device=device)
    with inference(model):
        for cpu_batch in batches:
            batch = cpu_batch.to(device)
            output = model(batch, None if routing is None else routing(batch.ids))
            total += _sums(batch, output)
    loss_sum, scored, routed, agreed, *served = sum_over_ranks(total).tolist()
    if not scored:
        raise UserError("nothing to evaluate: the data set has no token to predict; is it shorter than two tokens?")
    return Evaluation(
        loss=loss_sum / scored,
        tokens=int(scored),
        agreement=agreed / routed if routing is None and routed else None,
        served_LN=tuple(tuple(map(int, served[i * experts : (i + 1) * experts])) for i in range(layers)),
    )


def _sums(batch: Batch, output: ForwardOutput) -> Tensor:
    """float64: loss, scored tokens, routed (token, layer) pairs, agreeing pairs, then served tokens by expert."""
    # where, not a product: a NaN at padding must not reach the sum.
    loss_BS = torch.where(batch.scored, output.loss_BS.double(), 0.0)
    agreed = [layer.agree for layer in output.layers if layer.agree is not None]
    head = [loss_BS.sum(), batch.scored.sum(), batch.real.sum() * len(agreed), sum(agreed, loss_BS.new_zeros(()))]
    return torch.cat([torch.stack([h.double() for h in head]), *(layer.served_N.double() for layer in output.layers)])


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
