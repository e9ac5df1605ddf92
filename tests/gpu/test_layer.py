"""The MoE layer on the GPU against the same layer on the CPU, forward and backward, in both stages.

On the CPU experts are served one after another, on a GPU in bf16 all at once where there is a kernel for it,
so that this also compares the two ways.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.moe.routing_pass import LayerReport, RoutingPass
from stablemoe_ds.routing.routes import TokenView
from tests.gpu.cases import (
    CLOSE,
    DTYPES,
    LENGTH,
    SEQUENCES,
    SHAPES,
    assert_close,
    build,
    gradients,
    some_batch,
    table_of,
)
from tests.tiny import VOCAB


def serve(
    groups: Groups, device: str, dtype: torch.dtype, shape: str, expert_TK: Tensor | None, real_T: Tensor
) -> tuple[dict[str, Tensor], LayerReport]:
    """The first MoE layer's output and every gradient, for the same random hidden states on every device."""
    layer = build(groups, device, dtype, **SHAPES[shape]).moe_layers[0]
    random = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(LENGTH, SEQUENCES, 32, generator=random).to(device, dtype) for _ in range(2))
    hidden.requires_grad_()
    known = {} if expert_TK is None else {layer.block: expert_TK.to(device)}
    tokens = TokenView(some_batch().ids.to(device), real_T.to(device))
    out, report = layer(hidden, RoutingPass(tokens, known))
    ((out * weight).sum() + sum(report.loss_sums.values())).backward()
    assert hidden.grad is not None
    return {"output": out.detach(), "hidden": hidden.grad, **gradients(layer)}, report


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", [1, 2], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gpu_is_cpu(groups: Groups, shape: str, stage: int, dtype: torch.dtype) -> None:
    batch = some_batch()
    routing = table_of(build(groups, "cpu", torch.float32, **SHAPES[shape]))
    expert_TK = next(iter(routing(batch.ids).values())) if stage == 2 else None
    real_T = batch.real.t().flatten()
    wanted, cpu = serve(groups, "cpu", dtype, shape, expert_TK, real_T)
    got, gpu = serve(groups, "cuda", dtype, shape, expert_TK, real_T)
    assert torch.equal(gpu.expert_TK.cpu(), cpu.expert_TK)
    assert got["output"].dtype == dtype
    assert got["output"].is_cuda
    if dtype == torch.float32:
        assert_close(got, wanted, CLOSE[dtype])
    else:
        exact, _ = serve(groups, "cpu", torch.float32, shape, expert_TK, real_T)
        assert_as_exact(got, wanted, exact)


def assert_as_exact(got: dict[str, Tensor], other: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Of two ways to round, the first is no further from the exact tensors than the second, or than bf16 rounds."""
    for name, tensor in exact.items():
        ours, theirs = (float((way[name].cpu().double() - tensor.double()).norm()) for way in (got, other))
        assert ours <= max(1.5 * theirs, CLOSE[torch.bfloat16] * float(tensor.double().norm())), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_expert_without_tokens_gets_a_gradient_of_zero(groups: Groups, dtype: torch.dtype) -> None:
    expert_TK = torch.tensor([0, 1, 3]).repeat(LENGTH * SEQUENCES)[: LENGTH * SEQUENCES].view(-1, 1)  # never 2
    got, report = serve(groups, "cuda", dtype, "paper", expert_TK, torch.ones(LENGTH * SEQUENCES, dtype=torch.bool))
    assert report.served_N.tolist()[2] == 0
    experts = {name: grad for name, grad in got.items() if name.startswith("experts.")}
    assert experts
    for name, grad in experts.items():
        assert not grad[2].any(), name
        assert torch.isfinite(grad).all(), name
        assert grad[0].any(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_padding(groups: Groups, dtype: torch.dtype) -> None:
    expert_TK = torch.randint(4, (LENGTH * SEQUENCES, 1), generator=torch.Generator().manual_seed(VOCAB))
    got, report = serve(groups, "cuda", dtype, "modern", expert_TK, torch.zeros(LENGTH * SEQUENCES, dtype=torch.bool))
    assert not report.served_N.any()
    assert all(torch.isfinite(value).all() for value in got.values())
    assert not any(grad.any() for name, grad in got.items() if name.startswith("experts."))
