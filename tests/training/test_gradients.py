"""Gradients between the backward pass and AdamW: their fp32 sums arrive as they are, and their norm is that of all."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stablemoe_ds.config.schema import RunConfig
from tests.distributed.cases import LENGTH, SEQUENCES, batch, run_of
from tests.distributed.launch import run_distributed
from tests.distributed.worker import engine_of, share

MICRO_BATCHES = 4
EXACT = 1e-6
"""Largest relative error in norm of an fp32 sum; one rounding to bf16 makes 1e-3."""


def gradients_of_an_update(run: RunConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """By parameter: what AdamW was given for this rank's part of it, and the same part summed in float64.

    The second is built from what autograd hands to each parameter, micro-batch by micro-batch, before DeepSpeed sees
    it, and summed over ranks here.
    """
    from stablemoe_ds.checkpoint.fp32_state import WEIGHT, Fp32State
    from stablemoe_ds.model.layout import shape_of
    from stablemoe_ds.routing.source import LEARNED
    from stablemoe_ds.training.routed_batch import RoutedBatch

    with engine_of(run) as engine:
        groups, named = engine.groups, dict(engine.model.named_parameters())
        random, fp32 = torch.Generator().manual_seed(3), Fp32State(engine.deepspeed)
        for parameter in named.values():
            change = torch.randn(shape_of(parameter), generator=random).to(parameter.device) * 0.1
            fp32.write(parameter, WEIGHT, fp32.read(parameter, WEIGHT) + change)
        sums = {name: torch.zeros(shape_of(p), dtype=torch.float64, device=p.device) for name, p in named.items()}
        for name, parameter in named.items():
            parameter.register_hook(partial(_add_to, sums[name]))
        given: dict[int, Tensor] = {}

        def look(adamw: torch.optim.Optimizer, *_: Any) -> None:
            for group in adamw.param_groups:
                given.update({id(p): p.grad.detach().clone() for p in group["params"] if p.grad is not None})

        adamw = engine.optimizer.optimizer if run.parallel.zero_stage else engine.optimizer
        adamw.register_step_pre_hook(look)
        mine = [share(batch(n, SEQUENCES), groups) for n in range(MICRO_BATCHES)]
        engine.set_learning_rate(1e-3)
        engine.accumulate([RoutedBatch(one) for one in mine], LEARNED, 0)
        scale = getattr(engine.optimizer, "loss_scale", 1.0)
        engine.update()

        found = {}
        squares = torch.zeros((), dtype=torch.float64, device=groups.world.device)
        for name, parameter in named.items():
            wanted = sums[name] / groups.data_size / scale
            alone = ".experts." in name and groups.expert > 1
            if not alone:
                dist.all_reduce(wanted)
            squares += wanted.square().sum() / (1 if alone else groups.world.size)
            stretch = fp32.stretch(parameter)
            if stretch is not None and stretch.numel:
                got = given[id(stretch.held)].view(-1)[stretch.at :][: stretch.numel]
                found[name] = got, wanted.view(-1)[stretch.start :][: stretch.numel]
        dist.all_reduce(squares)
        found["norm"] = torch.tensor([engine.gradient_norm()]), squares.sqrt()[None].cpu()
    return {name: (got.cpu(), wanted.cpu()) for name, (got, wanted) in found.items()}


def _add_to(total: Tensor, gradient: Tensor) -> None:
    total.add_(gradient)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-12))


def run_of_update(dtype: str, zero: int, ranks: int, expert: int, **layout: Any) -> RunConfig:
    """Four micro-batches an update, nothing clipped: a factor would change which values bf16 can represent."""
    micro = SEQUENCES // ranks
    sections = run_of("modern", dtype=dtype, zero=zero, expert=expert, micro=micro, **layout).model_dump()
    sections["optimizer"]["clip"] = 0.0
    sections["schedule"]["tokens_per_step"] = MICRO_BATCHES * SEQUENCES * LENGTH
    return RunConfig.model_validate(sections)


def assert_exact(ranks: list[dict[str, tuple[Tensor, Tensor]]]) -> None:
    for found in ranks:
        assert all(got.dtype == torch.float32 for got, _ in found.values())
        errors = {name: error(got, wanted) for name, (got, wanted) in found.items()}
        assert max(errors.values()) < EXACT, errors


LAYOUTS = pytest.mark.parametrize(
    ("ranks", "expert"), [(1, 1), (2, 1), (2, 2)], ids=["alone", "two copies", "experts over two"]
)


@pytest.mark.distributed
@LAYOUTS
@pytest.mark.parametrize(
    ("dtype", "zero"), [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
)
def test_adamw_gets_the_fp32_sum(dtype: str, zero: int, ranks: int, expert: int) -> None:
    found = run_distributed(ranks, gradients_of_an_update, run_of_update(dtype, zero, ranks, expert))
    assert_exact(found)
    everything = torch.cat([got.flatten() for rank in found for name, (got, _) in rank.items() if name != "norm"])
    assert share_of_bf16(everything) < 0.5


@pytest.mark.distributed
def test_so_it_does_in_host_memory() -> None:
    assert_exact(run_distributed(2, gradients_of_an_update, run_of_update("bf16", 3, 2, 2, offload="all")))


@pytest.mark.distributed
@LAYOUTS
def test_so_it_does_through_the_optimizer_of_fp16(ranks: int, expert: int) -> None:
    """At ZeRO 1 fp16, which needs a GPU, goes through another of DeepSpeed's optimizers than bf16."""
    assert_exact(run_distributed(ranks, through_the_other_optimizer, run_of_update("bf16", 1, ranks, expert)))


def through_the_other_optimizer(run: RunConfig) -> dict[str, tuple[Tensor, Tensor]]:
    from deepspeed.runtime import engine

    with mock.patch.object(engine.DeepSpeedEngine, "_do_optimizer_sanity_check", return_value=engine.ZERO_OPTIMIZATION):
        return gradients_of_an_update(run)


def share_of_bf16(values: Tensor) -> float:
    """Which share of the values that are not zero bf16 can represent."""
    values = values[values != 0]
    return float((values.bfloat16().float() == values).float().mean())
