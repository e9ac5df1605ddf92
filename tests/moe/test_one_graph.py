"""An MoE layer of stage 2 is one graph: nothing in it depends on what the host would have to know of the routes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from stablemoe_ds.distributed.placement import ALONE
from stablemoe_ds.model.gpt import build_moe_layer
from stablemoe_ds.moe.layer import MoELayer
from stablemoe_ds.moe.plan import plan_dispatch
from stablemoe_ds.moe.routing_pass import LayerReport, RoutingPass
from stablemoe_ds.routing.routes import TokenView
from tests.tiny import VOCAB, tiny_run

PAPER = {"norm": "layernorm", "activation": "relu", "bias": True}
SHAPES: dict[str, dict[str, Any]] = {
    "paper": {"model": PAPER, "moe": {"sublayers": 2}},
    "modern": {"moe": {"top_k": 2, "shared_experts": 1, "gate": "learned"}, "parallel": {"dispatch_parts": 2}},
    "hash": {"moe": {"router": "hash"}},
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts the graphs of the layers; one that would have to be cut in two raises. Backward passes are traced, too."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    monkeypatch.setattr("stablemoe_ds.moe.experts.can_group", lambda *_: True)  # as on a GPU that has the kernel
    whole = torch.compile(MoELayer._route_and_serve, backend=counter, fullgraph=True)
    monkeypatch.setattr("stablemoe_ds.moe.layer.compile_once", lambda _: whole)
    monkeypatch.setattr("stablemoe_ds.moe.experts.compile_once", lambda function: function)  # not by themselves
    yield counter
    torch._dynamo.reset()


def layer_of(compiled: bool, index: int = 0, **sections: Any) -> MoELayer:
    """In bf16 as on a GPU, every weight moved: experts would start at zero."""
    sections["parallel"] = {"compile": compiled, **sections.get("parallel", {})}
    run = tiny_run(**sections)
    layer = build_moe_layer(run, VOCAB, ALONE, run.moe.layers[index], index)
    random = torch.Generator().manual_seed(index)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    return layer.bfloat16().train()


def served(layer: MoELayer, seed: int) -> tuple[LayerReport, dict[str, Tensor]]:
    """What a layer does with random tokens along random routes, an expert of which has no tokens."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(8, 4, 32, generator=random).bfloat16().requires_grad_()
    expert_TK = torch.randint(3, (32, layer.router.top_k), generator=random)
    tokens = TokenView(torch.randint(VOCAB, (4, 8), generator=random), torch.ones(32, dtype=torch.bool))
    plan = plan_dispatch(expert_TK, 4, None, layer.parts)
    out, report = layer(hidden, RoutingPass(tokens, {layer.block: expert_TK}, seed, {layer.block: plan}))
    layer.zero_grad()
    out.square().sum().backward()
    assert hidden.grad is not None
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return report, {"output": out.detach(), "hidden": hidden.grad, **gradients}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_of_stage_2_is_one_graph_for_all_routes_and_layers(
    shape: str, graphs: CompileCounterWithBackend
) -> None:
    for index, seed in ((0, 1), (0, 2), (1, 3)):
        report, found = served(layer_of(True, index, **SHAPES[shape]), seed)
        expected_report, expected = served(layer_of(False, index, **SHAPES[shape]), seed)
        assert torch.equal(report.served_N, expected_report.served_N)
        torch.testing.assert_close(found, expected)
    assert graphs.frame_count == 1


def test_what_the_host_decides_stays_outside(graphs: CompileCounterWithBackend) -> None:
    served(layer_of(True, moe={"capacity_factor": 0.5}), 1)  # draws on the host which rows are cut
    served(layer_of(True).eval(), 1)  # generation has other numbers of rows in each call
    layer = layer_of(True)
    hidden = torch.randn(8, 4, 32).bfloat16()
    layer(hidden, RoutingPass(TokenView(torch.zeros(4, 8, dtype=torch.int64), torch.ones(32, dtype=torch.bool))))
    assert graphs.frame_count == 0, "stage 1 learns its sizes in the call"
