"""The Switch router against its paper's equations 1 and 4-6, one token at a time in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from stablemoe_ds.routing.routes import SumOverRanks
from stablemoe_ds.routing.switch import SwitchRouter, switch_sum
from tests.routing.batch import D, N, T, alone, stream, tokens

pytestmark = pytest.mark.usefixtures("device")


def make(top_k: int = 1) -> SwitchRouter:
    torch.manual_seed(8)
    router = SwitchRouter(D, N, top_k, False)
    torch.nn.init.normal_(router.centroids)
    return router


def shares(scores: list[float]) -> list[float]:
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


@pytest.mark.parametrize("top_k", [1, 2])
def test_choice_and_gate_are_the_softmax_over_all_experts(top_k: int) -> None:
    router, hidden = make(top_k), stream()
    routes = router(hidden, tokens(), None, alone)
    for t in range(T):
        p = shares((router.centroids.double() @ hidden[t].double()).tolist())
        best = sorted(range(N), key=lambda i: -p[i])[:top_k]
        assert routes.expert_TK[t].tolist() == best
        assert routes.gate_TK[t].tolist() == pytest.approx([p[i] for i in best], rel=1e-5)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("elsewhere", [[0] * N, [40, 0, 3, 1]], ids=["one rank", "more ranks"])
def test_loss_is_equation_4_over_all_ranks_with_its_closed_gradient(padding: bool, elsewhere: list[int]) -> None:
    """L = N sum_i f_i P_i, f constant; of the sum over tokens dL/ds_tj = N p_tj (f_j - sum_i f_i p_ti)."""
    scores = stream(3)[:, :N].double().requires_grad_()
    real = tokens(padding).real_T
    p = [shares(row) for row in scores.tolist()]
    chosen = [max(range(N), key=row.__getitem__) if keep else None for row, keep in zip(p, real.tolist(), strict=True)]
    here = [chosen.count(i) for i in range(N)]
    total = [a + b for a, b in zip(here, elsewhere, strict=True)]
    f = [n / sum(total) for n in total]
    mean_p = [sum(p[t][i] for t in range(T) if real[t]) / int(real.sum()) for i in range(N)]

    others = torch.tensor(elsewhere)
    loss = switch_sum(scores.softmax(1).float(), real, torch.tensor(here), lambda counts: counts + others)
    loss.backward()
    assert float(loss) / int(real.sum()) == pytest.approx(N * sum(a * b for a, b in zip(f, mean_p, strict=True)))
    wanted = torch.zeros(T, N, dtype=torch.float64)
    for t in range(T):
        if real[t]:
            inner = sum(f[i] * p[t][i] for i in range(N))
            wanted[t] = torch.tensor([N * p[t][j] * (f[j] - inner) for j in range(N)])
    torch.testing.assert_close(scores.grad, wanted, rtol=1e-5, atol=1e-6)
    assert wanted.abs().sum() > 0.1


def test_router_asks_all_ranks_and_reports_its_own_counts() -> None:
    router, hidden, view = make(), stream(), tokens(padding=True)
    others = torch.tensor([200.0, 0, 0, 0])
    more: SumOverRanks = lambda counts: counts + others  # noqa: E731
    here, everywhere = (router(hidden, view, None, total) for total in (alone, more))
    assert torch.equal(here.counts_N, everywhere.counts_N)
    p = (hidden @ router.centroids.T).softmax(1) * view.real_T[:, None]
    f = (here.counts_N + others) / (here.counts_N + others).sum()
    torch.testing.assert_close(everywhere.loss_sums["balance"], N * (p.sum(0) * f).sum())
    assert set(here.loss_sums) == {"balance"}


def test_even_shares_cost_one_a_token() -> None:
    """The least there is: f = P = 1 / N."""
    share = torch.full((T, N), 1 / N)
    counts = torch.full((N,), 7)
    assert float(switch_sum(share, torch.ones(T, dtype=torch.bool), counts, alone)) == pytest.approx(T)


def test_a_loss_step_makes_the_load_more_even() -> None:
    router, hidden, view = make(), stream() + make().centroids[2].detach(), tokens()
    before = router(hidden, view, None, alone).counts_N
    optimizer = torch.optim.SGD(router.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (router(hidden, view, None, alone).loss_sums["balance"] / T).backward()
        optimizer.step()
    after = router(hidden, view, None, alone).counts_N
    assert int(after.max()) < int(before.max())


def test_evaluation_and_known_routes_have_no_loss() -> None:
    router, fixed_TK = make(), torch.arange(T)[:, None] % N
    followed = router(stream(), tokens(), fixed_TK, alone)
    assert torch.equal(followed.expert_TK, fixed_TK)
    assert followed.loss_sums == {}
    assert router.eval()(stream(), tokens(), None, alone).loss_sums == {}


def test_without_a_token_the_loss_is_zero() -> None:
    view = tokens()
    view.real_T.zero_()
    routes = make()(stream(), view, None, alone)
    assert float(routes.loss_sums["balance"]) == 0
    assert (routes.expert_TK == -1).all()
