"""The router of BASE layers: assigned in training, greedy in use; what is imitated is where tokens were sent."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from stablemoe_ds.routing.base_layers import BaseLayersRouter
from stablemoe_ds.routing.distilled import DistilledRouter
from tests.routing.batch import VOCAB, D, N, S, T, alone, stream, tokens


def make(distilled: bool = False) -> BaseLayersRouter:
    torch.manual_seed(8)
    small = DistilledRouter("word", VOCAB, N, dim=7, layers=1, width=D, heads=2, positions=S) if distilled else None
    router = BaseLayersRouter(D, N, 1, False, small)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


def skewed(seed: int = 2) -> torch.Tensor:
    """A stream whose tokens mostly like the same expert."""
    return stream(seed) + 0.5 * make().centroids[1].detach()


@pytest.mark.parametrize("padding", [False, True])
def test_training_assigns_real_tokens_evenly_and_nearly_at_best(padding: bool) -> None:
    router, view, hidden = make(), tokens(padding), skewed()
    routes = router(hidden, view, None, alone)
    real = int(view.real_T.sum())
    room = math.ceil(real / N)
    assert int(routes.counts_N.sum()) == real
    assert int(routes.counts_N.max()) <= room
    assert (routes.expert_TK[~view.real_T] == -1).all()

    scores = (hidden @ router.centroids.T)[view.real_T].detach()
    slots = scores.repeat_interleave(room, dim=1).numpy()
    best = slots[linear_sum_assignment(slots, maximize=True)].sum()
    kept = float(scores.gather(1, routes.expert_TK[view.real_T]).sum())
    assert best - kept <= real * float(scores.max() - scores.min()) / 50
    greedy = torch.bincount(scores.argmax(1), minlength=N)
    assert int(greedy.max()) > room, "without an assignment the load would be uneven"


def test_gate_is_the_sigmoid_of_the_assigned_affinity_and_teaches() -> None:
    router, hidden = make(), skewed().requires_grad_()
    routes = router(hidden, tokens(), None, alone)
    for t, expert in enumerate(routes.expert_TK[:, 0].tolist()):
        affinity = float(hidden[t].double() @ router.centroids[expert].double())
        assert float(routes.gate_TK[t]) == pytest.approx(1 / (1 + math.exp(-affinity)), rel=1e-5, abs=1e-6)
    assert routes.loss_sums == {}
    routes.gate_TK.sum().backward()
    assert router.centroids.grad is not None
    assert router.centroids.grad.any()
    assert hidden.grad is not None
    assert hidden.grad.any()


def test_evaluation_is_greedy_token_by_token() -> None:
    router, hidden = make().eval(), skewed()
    routes = router(hidden, tokens(), None, alone)
    assert torch.equal(routes.expert_TK[:, 0], (hidden @ router.centroids.T).argmax(1))
    alone_routes = [int(router(row[None].repeat(T, 1), tokens(), None, alone).expert_TK[0]) for row in hidden]
    assert routes.expert_TK[:, 0].tolist() == alone_routes, "a token's expert does not depend on the others"


def test_what_stands_at_padding_bids_for_nothing() -> None:
    router, view, hidden = make(), tokens(padding=True), skewed()
    other = torch.where(view.real_T[:, None], hidden, stream(99, 10.0))
    once, again = (router(h, view, None, alone) for h in (hidden, other))
    assert torch.equal(once.expert_TK, again.expert_TK)


def test_distillation_names_the_assigned_expert_not_the_best() -> None:
    router, view, hidden = make(distilled=True), tokens(padding=True), skewed()
    routes = router(hidden, view, None, alone)
    assert router.distilled is not None
    logits = router.distilled(view.ids_BS).transpose(0, 1).reshape(T, N)
    wanted = {"assigned": 0.0, "best": 0.0}
    agree = 0
    for t in view.real_T.nonzero()[:, 0].tolist():
        log_p = logits[t].log_softmax(0)
        wanted["assigned"] -= float(log_p[routes.expert_TK[t, 0]])
        wanted["best"] -= float(log_p[(router.centroids @ hidden[t]).argmax()])
        agree += int(logits[t].argmax() == routes.expert_TK[t, 0])
    assert set(routes.loss_sums) == {"distill"}
    assert float(routes.loss_sums["distill"]) == pytest.approx(wanted["assigned"], rel=1e-5)
    assert abs(wanted["assigned"] - wanted["best"]) > 1
    assert routes.agree is not None
    assert int(routes.agree) == agree


def test_known_routes_are_followed() -> None:
    router, hidden = make(distilled=True), skewed()
    fixed_TK = torch.arange(T)[:, None] % N
    routes = router(hidden, tokens(), fixed_TK, alone)
    assert torch.equal(routes.expert_TK, fixed_TK)
    assert routes.loss_sums == {}
    torch.testing.assert_close(routes.gate_TK, torch.sigmoid((hidden @ router.centroids.T).gather(1, fixed_TK)))


def test_a_stream_that_has_diverged_is_left_to_the_loss() -> None:
    """An error here would end one rank and leave the others waiting; a gate of NaN is seen by all."""
    hidden = skewed()
    hidden[3] = math.nan
    routes = make()(hidden, tokens(), None, alone)
    assert (routes.expert_TK >= 0).all()
    assert routes.gate_TK[3].isnan().all()
