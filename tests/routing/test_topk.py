"""Best-k routing with a bias that follows the load, against the equations of DeepSeek-V3 (section 2.1.2)."""

from __future__ import annotations

import math

import pytest
import torch

from stablemoe_ds.routing.topk import TopKRouter
from tests.routing.batch import D, N, T, alone, stream, tokens

pytestmark = pytest.mark.usefixtures("device")


def make(top_k: int = 2, bias_step: float = 0.01) -> TopKRouter:
    torch.manual_seed(8)
    router = TopKRouter(D, N, top_k, False, bias_step=bias_step)
    torch.nn.init.normal_(router.centroids, std=0.3)
    return router


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_bias_joins_the_choice_but_not_the_gate(top_k: int) -> None:
    """The k largest of sigma(s) + b; gates are sigma(s), divided by their sum if there are several."""
    router, hidden = make(top_k), stream()
    unbiased = router(hidden, tokens(), None, alone)
    router.bias_N += torch.tensor([0.3, -0.2, 0.0, 0.1])
    routes = router(hidden, tokens(), None, alone)
    assert not torch.equal(routes.expert_TK, unbiased.expert_TK)
    bias = router.bias_N.tolist()
    for t in range(T):
        weight = [1 / (1 + math.exp(-s)) for s in (router.centroids.double() @ hidden[t].double()).tolist()]
        best = sorted(range(N), key=lambda i: -(weight[i] + bias[i]))[:top_k]
        assert routes.expert_TK[t].tolist() == best
        total = sum(weight[i] for i in best) if top_k > 1 else 1
        assert routes.gate_TK[t].tolist() == pytest.approx([weight[i] / total for i in best], rel=1e-5)


def test_bias_falls_for_overloaded_and_rises_for_underloaded_experts() -> None:
    router = make(bias_step=0.25)
    router.after_update(torch.tensor([10.0, 0.0, 4.0, 2.0]), None)  # mean 4
    assert router.bias_N.tolist() == [-0.25, 0.25, 0.0, 0.25]
    router.after_update(torch.full((N,), 9.0), None)
    assert router.bias_N.tolist() == [-0.25, 0.25, 0.0, 0.25]


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_skewed_stream_is_balanced_without_a_loss(top_k: int) -> None:
    router = make(top_k)
    loads = []
    for update in range(300):
        hidden = stream(update, 0.5) + 2 * router.centroids[1].detach()
        routes = router(hidden, tokens(), None, alone)
        assert routes.loss_sums == {}
        router.after_update(routes.counts_N.float(), None)
        loads.append(routes.counts_N.float())
    first, last = (torch.stack(part).sum(0) for part in (loads[:10], loads[-50:]))
    assert first.max() / first.mean() > 1.5
    assert last.max() / last.mean() < 1.1


def test_the_bias_is_state_and_not_a_parameter() -> None:
    router = make()
    assert [name for name, _ in router.named_parameters()] == ["centroids"]
    assert [name for name, _ in router.named_buffers()] == ["bias_N"]
    cast = torch.nn.ModuleList([router]).to(torch.bfloat16)[0]
    assert cast.bias_N.dtype == torch.float32


def test_the_gate_teaches_the_centroids() -> None:
    router, hidden = make(), stream().requires_grad_()
    router(hidden, tokens(), None, alone).gate_TK[:, 0].sum().backward()
    assert router.centroids.grad is not None
    assert router.centroids.grad.any()


def test_padding_is_neither_routed_nor_counted() -> None:
    view = tokens(padding=True)
    routes = make()(stream(), view, None, alone)
    assert (routes.expert_TK[~view.real_T] == -1).all()
    assert int(routes.counts_N.sum()) == 2 * int(view.real_T.sum())


def test_gates_whose_sigmoids_underflow_are_finite_and_so_is_their_gradient() -> None:
    """No expert wants the token: affinities of -300 are sigmoids of 0 in fp32."""
    router = make()
    with torch.no_grad():
        router.centroids.copy_(torch.full((N, D), -300.0 / D))
    gates = router(torch.ones(T, D), tokens(), None, alone).gate_TK
    assert gates.isfinite().all()
    gates.sum().backward()
    assert router.centroids.grad is not None
    assert router.centroids.grad.isfinite().all()
