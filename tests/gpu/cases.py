"""Models and batches of these tests, and what a step of stage 2 is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.fixed import TableRouting, freeze
from stablemoe_ds.training.planner import Planner
from stablemoe_ds.training.routed_batch import RoutedBatch
from tests.tiny import VOCAB, tiny_run

LENGTH, SEQUENCES = 16, 4
SHAPES: dict[str, dict[str, Any]] = {
    "paper": {
        "model": {"positions": "learned", "norm": "layernorm", "activation": "relu", "bias": True, "kv_heads": None},
        "moe": {"sublayers": 2},
    },
    "modern": {},
    "top 2, shared": {"moe": {"top_k": 2, "shared_experts": 1}},
}
DTYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative error: norm of the difference over norm of what is expected."""


def build(groups: Groups, device: str | torch.device, dtype: torch.dtype, **sections: Any) -> StableMoEGPT:
    """A tiny model, equal on every device up to rounding. Every weight is moved: experts would start at zero."""
    model = StableMoEGPT(tiny_run(**sections), VOCAB, groups.placement)
    random = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    return model.to(device, dtype).train()


def some_batch(seed: int = 5) -> Batch:
    """Random ids on the CPU; the first sequence ends in padding."""
    ids = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    real = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    real[0, 12:] = False
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), real, real)


def table_of(model: StableMoEGPT) -> TableRouting:
    """What the model would follow in stage 2, looked up where the model is."""
    run = model.run_config
    routing = freeze(model.distilled_routers, run.moe.top_k, tuple(run.moe.layers))
    assert isinstance(routing, TableRouting)
    return routing


def planned(model: StableMoEGPT, groups: Groups, batch: Batch) -> RoutedBatch:
    """The batch as stage 2 is given it: on the CPU, with routes and plans."""
    planner = Planner(iter([[batch]]), table_of(model).table, groups, model.run_config.parallel)
    ((routed,),) = planner
    planner.close()
    return routed


def loss_of(model: StableMoEGPT, routed: RoutedBatch) -> Tensor:
    """Loss of a micro-batch that lies where the model is, auxiliary losses added as they are."""
    output = model(routed.batch, routed.known, 0, routed.plans)
    loss = output.loss_sum
    for name in ("balance", "distill"):
        auxiliary = output.auxiliary_sum(name)
        loss = loss if auxiliary is None else loss + auxiliary
    return loss


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], error: float) -> None:
    """Every tensor, wherever it lies, within a relative error in norm; no name may be missing."""
    assert got.keys() == wanted.keys()
    for name, expected in wanted.items():
        expected = expected.double().cpu()
        difference = (got[name].double().cpu() - expected).norm()
        assert float(difference) <= error * float(expected.norm()) + 1e-7, name
