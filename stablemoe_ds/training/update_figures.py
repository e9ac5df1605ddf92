"""The figures of one update: on the device until they are read, then summed over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablemoe_ds.distributed.figures import Figures
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.model.gpt import ForwardOutput
from stablemoe_ds.tables.expert_load import max_loads


@dataclass(frozen=True)
class UpdateTotals:
    """Sums over all ranks and accumulation steps; host numbers.

    loss, balance, distill: sums over tokens. scored, real: tokens counted by them. agree: tokens for which the
    distilled router named the learned expert. dropped: (token, choice) pairs beyond capacity. unserved: (token, layer)
    pairs without an expert. counts_LN: tokens (times K) by MoE layer and expert.
    """

    loss: float
    balance: float
    distill: float
    scored: int
    real: int
    agree: int
    dropped: int
    unserved: int
    counts_LN: list[list[int]]  # noqa: N815

    @property
    def mean_loss(self) -> float:
        """Nats a scored token."""
        return self.loss / max(1, self.scored)

    @property
    def mean_auxiliary(self) -> float:
        """Balance and distillation loss a real token, unweighted."""
        return (self.balance + self.distill) / max(1, self.real)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.mean_loss + self.mean_auxiliary)

    @property
    def loads(self) -> list[float]:
        """max/mean load of each MoE layer in this update."""
        return max_loads(self.counts_LN)


class UpdateFigures:
    """This rank's share of an update's figures."""

    def __init__(self, tokens: Figures, dropped: Figures, groups: Groups) -> None:
        """``tokens``: equal on the tensor-parallel ranks. ``dropped``: of this process alone."""
        self._tokens, self._dropped, self._groups = tokens, dropped, groups
        self._totals: UpdateTotals | None = None

    def totals(self) -> UpdateTotals:
        """Over all ranks. Collective, and waits for the device, the first time."""
        if self._totals is None:
            sums = self._tokens.totals(self._groups.sum_over_data_ranks)
            self._totals = UpdateTotals(
                loss=sums.number("loss"),
                balance=sums.number("balance"),
                distill=sums.number("distill"),
                scored=sums.count("scored"),
                real=sums.count("real"),
                agree=sums.count("agree"),
                dropped=self._dropped.totals(self._groups.sum_over_world).count("dropped"),
                unserved=sums.count("unserved"),
                counts_LN=[[int(n) for n in row] for row in sums.rows("counts_LN")],
            )
        return self._totals

    def for_routers(self) -> tuple[Tensor, Tensor | None]:
        """fp32 [L, N] on the device, over all ranks: tokens by expert, and the routers' own statistics. Collective."""
        counts_LN, statistics_LN = (
            self._tokens.on_device(name, self._groups.sum_over_data_ranks) for name in ("counts_LN", "statistics_LN")
        )
        assert counts_LN is not None
        return counts_LN.float(), None if statistics_LN is None else statistics_LN.float()


def update_figures(outputs: Sequence[ForwardOutput], counted: Tensor, groups: Groups) -> UpdateFigures:
    """Of an update's micro-batches. counted: int64 [2], tokens scored and real."""
    tokens, dropped = Figures(), Figures()
    tokens.add(loss=(o.loss_sum for o in outputs), scored=counted[0], real=counted[1])
    for name in ("balance", "distill"):
        sums = [total for o in outputs if (total := o.auxiliary_sum(name)) is not None]
        tokens.add(**{name: sums})
    layers = [o.layers for o in outputs]
    if layers[0]:
        each = [layer for micro in layers for layer in micro]
        agree = [layer.agree for layer in each if layer.agree is not None]
        if agree:  # the mean over layers: each has looked at the same tokens
            tokens.add(agree=torch.stack(agree).sum() / max(1, len(agree) // len(outputs)))
        tokens.add(unserved=(layer.unserved for layer in each))
        tokens.add(counts_LN=(torch.stack([layer.served_N for layer in micro]) for micro in layers))
        dropped.add(dropped=(layer.dropped for layer in each))
        statistics = [[layer.statistic_N for layer in micro if layer.statistic_N is not None] for micro in layers]
        if statistics[0]:  # a mean over micro-batches and ranks
            mean_LN = torch.stack([torch.stack(micro).double() for micro in statistics]).mean(0)
            tokens.add(statistics_LN=mean_LN / groups.data_size)
    return UpdateFigures(tokens, dropped, groups)
