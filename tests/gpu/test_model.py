"""The whole model on the GPU: against the CPU, planned against unplanned, compiled against eager, and generating."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.evaluation.generate import generate
from stablemoe_ds.ops.compiler import require_compiler
from stablemoe_ds.training.routed_batch import RoutedBatch
from tests.gpu.cases import (
    CLOSE,
    DTYPES,
    SHAPES,
    assert_close,
    build,
    gradients,
    loss_of,
    planned,
    some_batch,
    table_of,
)

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 60, 6, 8]]


@pytest.mark.parametrize("stage", [1, 2], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_those_of_the_cpu(groups: Groups, shape: str, stage: int) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        model = build(groups, device, torch.float32, **SHAPES[shape])
        routed = planned(model, groups, some_batch()) if stage == 2 else RoutedBatch(some_batch())
        loss = loss_of(model, routed.to(device))
        loss.backward()
        found[device] = {"loss": loss.detach(), **gradients(model)}
    assert_close(found["cuda"], found["cpu"], 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_close_and_needs_no_autocast(groups: Groups, shape: str) -> None:
    fp32, bf16 = (build(groups, "cuda", dtype, **SHAPES[shape]) for dtype in DTYPES)
    routed = planned(fp32, groups, some_batch()).to("cuda")
    wanted, got = (loss_of(model, routed) for model in (fp32, bf16))
    got.backward()
    assert float(got) == pytest.approx(float(wanted), rel=CLOSE[torch.bfloat16])
    kept = {name for name, p in bf16.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, _ in bf16.named_parameters() if ".router." in name}
    assert all(torch.isfinite(grad).all() for grad in gradients(bf16).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_changes_no_bit_of_the_loss(groups: Groups, shape: str, dtype: torch.dtype) -> None:
    model = build(groups, "cuda", dtype, **SHAPES[shape])
    with_plan = planned(model, groups, some_batch()).to("cuda")
    without = RoutedBatch(with_plan.batch, with_plan.known)
    assert torch.equal(loss_of(model, with_plan), loss_of(model, without))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_is_eager(groups: Groups, dtype: torch.dtype) -> None:
    require_compiler()  # compiles something once, which is not to be counted
    torch.compiler.reset()
    found = []
    counters.clear()
    for way in (False, True):
        model = build(groups, "cuda", dtype, parallel={"compile": way})
        loss = loss_of(model, planned(model, groups, some_batch()).to("cuda"))
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert_close(found[1], found[0], 5 * CLOSE[dtype])
    assert not counters["graph_break"], "blocks, and in bf16 MoE layers, are one graph each"
    assert counters["stats"]["unique_graphs"] == (2 if dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_generation_is_that_of_the_cpu_with_a_cache_and_without(groups: Groups, shape: str) -> None:
    models = [build(groups, device, torch.float32, **SHAPES[shape]) for device in ("cpu", "cuda")]
    cpu, gpu = (generate(model, PROMPTS, table_of(model), max_new_tokens=8) for model in models)
    assert gpu == cpu
    assert gpu == generate(models[1], PROMPTS, table_of(models[1]), max_new_tokens=8, use_cache=False)
    assert len({i for row in gpu for i in row}) > 1, "a model that repeats one id proves nothing"


def test_bf16_generates(groups: Groups) -> None:
    model = build(groups, "cuda", torch.bfloat16)
    rows = generate(model, PROMPTS, table_of(model), max_new_tokens=8, temperature=0.8, seed=3)
    assert [len(row) for row in rows] == [8, 8, 8]
    assert rows == generate(model, PROMPTS, table_of(model), max_new_tokens=8, temperature=0.8, seed=3)
