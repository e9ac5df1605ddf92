"""Experts that choose tokens against a slow loop, and the thresholds that make evaluation causal."""

from __future__ import annotations

import math

import pytest
import torch

from stablemoe_ds.routing.expert_choice import MEMORY, ExpertChoiceRouter
from stablemoe_ds.routing.routes import Routes
from tests.routing.batch import B, D, N, T, alone, stream, tokens


def make(top_k: int = 1) -> ExpertChoiceRouter:
    torch.manual_seed(8)
    router = ExpertChoiceRouter(D, N, top_k, False)
    torch.nn.init.normal_(router.centroids, std=0.4)
    return router


def served(routes: Routes) -> list[dict[int, float]]:
    """By token: gate of each of its experts."""
    pairs = zip(routes.expert_TK.tolist(), routes.gate_TK.tolist(), strict=True)
    return [{e: g for e, g in zip(experts, gates, strict=True) if e >= 0} for experts, gates in pairs]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_each_expert_takes_its_share_of_the_tokens_that_want_it_most(top_k: int, padding: bool) -> None:
    router, hidden, view = make(top_k), stream(), tokens(padding)
    routes = router(hidden, view, None, alone)
    real = view.real_T.nonzero()[:, 0].tolist()
    takes = math.ceil(len(real) * top_k / N)
    share = (hidden.double() @ router.centroids.T.double()).softmax(1).tolist()
    wanted: list[dict[int, float]] = [{} for _ in range(T)]
    for expert in range(N):
        for t in sorted(real, key=lambda t: -share[t][expert])[:takes]:
            wanted[t][expert] = share[t][expert]
    found = served(routes)
    assert [set(tokens) for tokens in found] == [set(tokens) for tokens in wanted]
    for got, expected in zip(found, wanted, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
    assert routes.counts_N.tolist() == [takes] * N
    assert routes.loss_sums == {}


def test_some_tokens_have_several_experts_and_some_none() -> None:
    sizes = {len(experts) for experts in served(make()(stream(), tokens(), None, alone))}
    assert 0 in sizes
    assert max(sizes) > 1


def test_gates_teach_centroids_and_stream() -> None:
    router, hidden = make(), stream().requires_grad_()
    routes = router(hidden, tokens(), None, alone)
    routes.gate_TK[routes.expert_TK >= 0].sum().backward()
    assert router.centroids.grad is not None
    assert router.centroids.grad.any()
    assert hidden.grad is not None
    assert hidden.grad.any()


def test_a_threshold_follows_the_share_of_the_last_token_taken() -> None:
    router, hidden = make(), stream()
    routes = router(hidden, tokens(), None, alone)
    share = (hidden @ router.centroids.T).softmax(1)
    last = share.sort(0, descending=True).values[math.ceil(T / N) - 1]
    torch.testing.assert_close(routes.statistic_N, last)
    assert router.threshold_N.tolist() == pytest.approx([1 / N] * N), "nothing is learned within an update"
    router.after_update(routes.counts_N.float(), routes.statistic_N)
    torch.testing.assert_close(router.threshold_N, MEMORY / N + (1 - MEMORY) * last.detach())


def test_evaluation_does_not_look_at_later_tokens() -> None:
    router, hidden, view = make(2).eval(), stream(), tokens()
    before = served(router(hidden, view, None, alone))
    for position in range(1, T // B):
        changed = hidden.clone()
        changed[position * B :] = stream(50 + position)[position * B :]
        after = served(router(changed, view, None, alone))
        assert after[: position * B] == before[: position * B]
        assert after[position * B :] != before[position * B :]


def shares_taken(router: ExpertChoiceRouter) -> list[float]:
    """Share of fresh tokens that each expert takes in evaluation."""
    router.eval()
    counts = torch.stack([router(stream(1000 + i), tokens(), None, alone).counts_N for i in range(20)]).sum(0)
    return (counts / (20 * T)).tolist()


def test_learned_thresholds_keep_the_load_of_training() -> None:
    router = make()
    for update in range(100):
        routes = router(stream(update), tokens(), None, alone)
        router.after_update(routes.counts_N.float(), routes.statistic_N)
    even = [math.ceil(T / N) / T] * N
    assert shares_taken(router) == pytest.approx(even, abs=0.08)
    assert shares_taken(make()) != pytest.approx(even, abs=0.08)


def test_evaluation_serves_by_threshold() -> None:
    router, view = make().eval(), tokens(padding=True)
    router.threshold_N.copy_(torch.tensor([0.1, 0.5, 2.0, 0.3]))
    share = (stream() @ router.centroids.T).softmax(1)
    wanted = (share >= router.threshold_N) & view.real_T[:, None]
    found = served(router(stream(), view, None, alone))
    assert [sorted(experts) for experts in found] == [row.nonzero()[:, 0].tolist() for row in wanted]


def test_nothing_but_padding_is_routed_nowhere_and_teaches_nothing() -> None:
    router, view = make(), tokens()
    view.real_T.zero_()
    routes = router(stream(), view, None, alone)
    assert (routes.expert_TK == -1).all()
    before = router.threshold_N.clone()
    router.after_update(routes.counts_N.float(), routes.statistic_N)
    assert torch.equal(router.threshold_N, before)


def test_thresholds_are_state_of_the_router() -> None:
    assert [name for name, _ in make().named_buffers()] == ["threshold_N"]
