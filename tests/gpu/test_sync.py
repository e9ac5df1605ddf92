"""Who waits for the GPU: nobody in stage 2, whose sizes are known beforehand; one MoE layer once in stage 1."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.training.routed_batch import RoutedBatch
from tests.benchmarks.updates import engine_of, waits_of
from tests.benchmarks.updates import planned as planned_updates
from tests.gpu.cases import DTYPES, SHAPES, build, gradients, loss_of, planned, some_batch

WAITS = "synchronizing CUDA operation"


@contextmanager
def on_waiting(mode: str) -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU warns or raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_stage_2_never_waits(groups: Groups, shape: str, recompute: bool, dtype: torch.dtype) -> None:
    model = build(groups, "cuda", dtype, **SHAPES[shape], parallel={"recompute": recompute})
    routed = planned(model, groups, some_batch())
    loss_of(model, routed.to("cuda")).backward()  # what happens once only, such as moving rotary frequencies
    model.zero_grad()
    with on_waiting("error"):
        loss = loss_of(model, routed.to("cuda"))
        loss.backward()
    assert torch.isfinite(loss)
    assert all(grad.any() for name, grad in gradients(model).items() if ".experts." in name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_stage_1_waits_once_an_moe_layer(groups: Groups, shape: str, dtype: torch.dtype) -> None:
    model = build(groups, "cuda", dtype, **SHAPES[shape])
    routed = RoutedBatch(some_batch()).to("cuda")
    loss_of(model, routed).backward()
    with warnings.catch_warnings(record=True) as caught, on_waiting("warn"):
        warnings.simplefilter("always")
        loss_of(model, routed).backward()
    waits = [w for w in caught if WAITS in str(w.message)]
    assert len(waits) == len(model.moe_layers), [f"{w.filename}:{w.lineno}" for w in waits]


@pytest.mark.parametrize(("dtype", "zero"), [("fp32", 0), ("fp32", 1), ("bf16", 1), ("bf16", 2)])
def test_a_whole_update_of_stage_2_waits_for_the_norm_alone(groups: Groups, dtype: str, zero: int) -> None:
    engine = engine_of(groups, dtype, zero)
    engine.freeze_distilled()
    steps = planned_updates(engine)
    waits = waits_of(engine, lambda: next(steps))
    assert sum(waits.values()) <= 1, waits


def test_the_guard_notices_a_wait(groups: Groups) -> None:
    with on_waiting("error"), pytest.raises(RuntimeError, match=WAITS):
        torch.ones(3, device="cuda").tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_plans_come_in_pinned_memory_and_arrive_whole(groups: Groups, shape: str) -> None:
    routed = planned(build(groups, "cuda", torch.float32, **SHAPES[shape]), groups, some_batch())
    here, there = tensors_of(routed), tensors_of(routed.to("cuda"))
    assert len(here) > 6
    assert all(tensor.is_pinned() for tensor in here)
    assert all(tensor.is_cuda for tensor in there)
    assert all(torch.equal(one, other.cpu()) for one, other in zip(here, there, strict=True))


def tensors_of(routed: RoutedBatch) -> list[Tensor]:
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    routed.map(collect)
    return found
