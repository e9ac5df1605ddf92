"""Attention that stays inside documents: flex_attention's kernel on the GPU, a mask of every pair on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.distributed.groups import Groups
from tests.gpu.cases import CLOSE, DTYPES, assert_close, build, gradients, loss_of, planned
from tests.gpu.test_sync import on_waiting
from tests.tiny import VOCAB

LENGTH, EOS = 256, 7
APART: dict[str, Any] = {
    "model": {"hidden_size": 64},  # heads of 16: the kernel has none narrower
    "data": {"sequence_length": LENGTH, "document_mask": "attention", "eos_id": EOS},
    "schedule": {"tokens_per_step": 2 * LENGTH},
}


def batch() -> Batch:
    """Two sequences of random ids, which end a document at every 64th token or so."""
    ids = torch.randint(VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), real, real)


def test_loss_and_gradients_are_those_of_the_cpu(groups: Groups) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        model = build(groups, device, torch.float32, **APART)
        loss = loss_of(model, planned(model, groups, batch()).to(device))
        loss.backward()
        found[device] = {"loss": loss.detach(), **gradients(model)}
    assert_close(found["cuda"], found["cpu"], 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stage_2_never_waits(groups: Groups, dtype: torch.dtype) -> None:
    model = build(groups, "cuda", dtype, **APART)
    routed = planned(model, groups, batch())
    loss_of(model, routed.to("cuda")).backward()  # compiles the kernel
    model.zero_grad()
    with on_waiting("error"):
        loss = loss_of(model, routed.to("cuda"))
        loss.backward()
    exact = build(groups, "cpu", torch.float32, **APART)
    assert float(loss) == pytest.approx(float(loss_of(exact, planned(exact, groups, batch()))), rel=CLOSE[dtype] + 1e-3)
