"""Learning rate and parameter groups, each against its definition."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from stablemoe_ds.config.schema import OptimizerConfig, ScheduleConfig
from tests.tiny import VOCAB, tiny_run

if TYPE_CHECKING:
    from stablemoe_ds.distributed.groups import Groups

PEAK = 3e-3


def slow_rates(decay: str, steps: int, warmup: int, ratio: float) -> list[float]:
    """Knots of the schedule, joined by straight lines; the cosine by the real part of a rotation."""
    knots = [(-1.0, 0.0), (warmup - 1.0, PEAK)] if warmup else []
    rates = []
    for step in range(steps):
        if step < warmup:
            rates.append(float(np.interp(step, *zip(*knots, strict=True))))
            continue
        share = (step - warmup) / (steps - warmup)
        left = {"constant": 1.0, "linear": 1 - share, "cosine": np.exp(1j * np.pi * share).real / 2 + 0.5}[decay]
        low = PEAK if decay == "constant" else PEAK * ratio
        rates.append(low + (PEAK - low) * float(left))
    return rates


@pytest.mark.parametrize("ratio", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_learning_rate(decay: Any, warmup: int, ratio: float) -> None:
    from stablemoe_ds.training.optimizer import learning_rate

    schedule = ScheduleConfig(steps=40, tokens_per_step=64, warmup_steps=warmup, decay=decay, min_lr_ratio=ratio)
    rates = [learning_rate(step, OptimizerConfig(lr=PEAK), schedule) for step in range(40)]
    assert rates == pytest.approx(slow_rates(decay, 40, warmup, ratio), rel=1e-12, abs=1e-18)
    assert rates[0] > 0
    assert max(rates) == rates[max(0, warmup - 1)] == PEAK
    assert all(later <= earlier for earlier, later in pairwise(rates[max(0, warmup - 1) :]))
    assert rates[-1] >= PEAK * ratio


SHAPES = {
    "paper": {"positions": "learned", "norm": "layernorm", "activation": "relu", "bias": True, "kv_heads": None},
    "modern": {"tie_embeddings": False},
}


@pytest.mark.parametrize("kind", ["word", "transformer"])
@pytest.mark.parametrize("shape", SHAPES)
def test_parameter_groups(shape: str, kind: str, world_groups: Groups) -> None:
    from stablemoe_ds.model.gpt import StableMoEGPT
    from stablemoe_ds.training.optimizer import DISTILLED, parameter_groups

    run = tiny_run(model=SHAPES[shape], moe={"distilled": {"kind": kind}, "shared_experts": 1})
    model = StableMoEGPT(run, VOCAB, world_groups.placement)
    for layer in model.moe_layers:
        layer.set_deepspeed_parallelism()
    groups = parameter_groups(model, 0.25)

    where = {id(p): group for group in groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(where) == len(names)
    assert where.keys() == names.keys()
    decayed = {names[key] for key, group in where.items() if group["weight_decay"]}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
    for name in names.values():
        leaf, routes = name.rsplit(".", 1)[-1], ".router." in name
        matrix = leaf in ("weight", "w1", "w2", "w3") and "norm" not in name and not routes
        assert (name in decayed) == matrix, name
    for key, group in where.items():
        assert (group["name"] == DISTILLED) == (".distilled." in names[key]), names[key]
        assert bool(group.get("moe")) == (".experts." in names[key]), names[key]
    assert any(".experts." in name for name in decayed)
    if shape == "paper":
        assert any(".experts." in n and n.rsplit(".", 1)[-1] in ("b1", "b2") for n in set(names.values()) - decayed)
