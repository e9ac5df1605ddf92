"""The router of both stages: choice, gate, who learns from which loss, precision, padding, ties."""

from __future__ import annotations

import pytest
import torch

from stablemoe_ds.routing.distilled import DistilledRouter
from stablemoe_ds.routing.router import best_experts
from stablemoe_ds.routing.routes import TokenView
from stablemoe_ds.routing.stablemoe import StableMoERouter

pytestmark = pytest.mark.usefixtures("device")
VOCAB, N, D, S, B = 30, 6, 16, 5, 4


def make(top_k: int = 1, normalize: bool = False) -> StableMoERouter:
    torch.manual_seed(8)
    distilled = DistilledRouter("word", VOCAB, N, dim=7, layers=1, width=D, heads=2, positions=S)
    router = StableMoERouter(D, N, top_k, normalize, distilled)
    torch.nn.init.normal_(router.centroids)
    torch.nn.init.normal_(distilled.centroids)
    return router


def stream(seed: int = 2) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(S * B, D, generator=random, device="cpu").to(torch.get_default_device())


def view(real_T: torch.Tensor | None = None) -> TokenView:
    ids_BS = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(1), device="cpu")
    ids_BS = ids_BS.to(torch.get_default_device())
    return TokenView(ids_BS, torch.ones(S * B, dtype=torch.bool) if real_T is None else real_T)


def alone(counts):
    return counts


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_choice_and_gate_are_the_centroids_affinity(top_k, normalize):
    router, hidden = make(top_k, normalize), stream()
    routes = router(hidden, view(), None, alone)
    for t in range(S * B):
        h = hidden[t].double()
        if normalize:
            h = h / (h.square().mean() + 1e-6).sqrt()
        scores = [float(centroid.double() @ h) for centroid in router.centroids]
        best = sorted(range(N), key=lambda i: -scores[i])[:top_k]
        assert routes.expert_TK[t].tolist() == best
        wanted = torch.sigmoid(torch.tensor([scores[i] for i in best], dtype=torch.float64))
        torch.testing.assert_close(routes.gate_TK[t].double(), wanted, rtol=1e-5, atol=1e-6)


def test_normalized_input_does_not_feel_the_scale_of_the_stream_and_raw_does():
    hidden = stream()
    for normalize in (True, False):
        router = make(normalize=normalize)
        near, far = (router(hidden * scale, view(), None, alone).gate_TK for scale in (1.0, 100.0))
        assert torch.allclose(near, far, atol=1e-4) is normalize


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_lowest_index_wins_a_tie(top_k):
    """Whole numbers, so that equal centroids give equal scores to the bit."""
    router = make(top_k)
    with torch.no_grad():
        router.centroids.copy_((router.centroids * 4).round()[[0, 1, 1, 0, 1, 0]])
    routes = router((stream() * 4).round(), view(), None, alone)
    first = {(0, 3), (1, 2)} if top_k == 2 else {(0,), (1,)}
    assert {tuple(row) for row in routes.expert_TK.tolist()} == first


def test_best_experts_orders_and_breaks_ties_downwards():
    scores = torch.tensor([[1.0, 3.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0], [-5.0, -7.0, -5.0, -4.0]])
    assert best_experts(scores, 3).tolist() == [[1, 2, 0], [0, 1, 2], [3, 0, 2]]
    assert best_experts(scores, 1).tolist() == [[1], [0], [3]]


def test_known_routes_are_followed_and_teach_nobody_but_the_gate():
    router, hidden = make(2), stream().requires_grad_()
    fixed_TK = torch.stack([torch.randperm(N)[:2] for _ in range(S * B)])
    routes = router(hidden, view(), fixed_TK, alone)
    assert torch.equal(routes.expert_TK, fixed_TK)
    assert routes.loss_sums == {}
    assert routes.agree is None
    torch.testing.assert_close(routes.gate_TK, torch.sigmoid((hidden @ router.centroids.T).gather(1, fixed_TK)))
    routes.gate_TK.sum().backward()
    assert router.centroids.grad.any()
    assert hidden.grad.any()
    assert all(p.grad is None for p in router.distilled.parameters())


def test_each_loss_reaches_only_whom_it_should():
    """Balance: centroids and stream. Distillation: only the router of ids, whose target is a constant."""
    reached = {}
    for name in ("balance", "distill"):
        router, hidden = make(), stream().requires_grad_()
        router(hidden, view(), None, alone).loss_sums[name].backward()
        named = {"stream": hidden, "centroids": router.centroids}
        named |= {
            "features": router.distilled.features.embedding.weight,
            "distilled centroids": router.distilled.centroids,
        }
        reached[name] = {key for key, tensor in named.items() if tensor.grad is not None and tensor.grad.any()}
    assert reached == {"balance": {"stream", "centroids"}, "distill": {"features", "distilled centroids"}}


def test_padding_is_neither_routed_nor_counted_nor_learned_from():
    router, hidden = make(2), stream().requires_grad_()
    real_T = stream(5)[:, 0] > -0.25
    tokens = view(real_T)
    routes = router(hidden, tokens, None, alone)
    assert (routes.expert_TK[~real_T] == -1).all()
    assert (routes.expert_TK[real_T] >= 0).all()
    assert int(routes.counts_N.sum()) == 2 * int(real_T.sum())

    sum(routes.loss_sums.values()).backward()
    assert not hidden.grad[~real_T].any()
    assert hidden.grad[real_T].any(dim=1).all()
    unseen = set(range(VOCAB)) - set(tokens.ids_BS.T.flatten()[real_T].tolist())
    rows = router.distilled.features.embedding.weight.grad
    assert not rows[sorted(unseen)].any()

    # What stands at padding is of no consequence, not even for the losses.
    other = stream(77)
    other[real_T] = hidden.detach()[real_T]
    again = router(other, tokens, None, alone)
    assert torch.equal(again.expert_TK, routes.expert_TK)
    for name, value in routes.loss_sums.items():
        torch.testing.assert_close(again.loss_sums[name], value)
    assert int(again.agree) == int(routes.agree)


def test_counts_of_all_ranks_decide_the_balance():
    """The same tokens are too many or too few depending on what the other ranks do."""
    router, hidden = make(), stream()
    asked = []

    def more(counts):
        asked.append(counts.clone())
        return counts + torch.tensor([100.0, 0, 0, 0, 0, 0])

    here = router(hidden, view(), None, alone)
    everywhere = router(hidden, view(), None, more)
    assert torch.equal(asked[0].long(), here.counts_N)
    assert torch.equal(everywhere.counts_N, here.counts_N), "reports stay this rank's own"
    total = here.counts_N.float() + torch.tensor([100.0, 0, 0, 0, 0, 0])
    excess = total[here.expert_TK[:, 0]] / total.mean() - 1
    torch.testing.assert_close(everywhere.loss_sums["balance"], (excess * here.gate_TK[:, 0]).sum())


def test_evaluation_reports_agreement_and_no_loss():
    router, tokens = make(2).eval(), view()
    routes = router(stream(), tokens, None, alone)
    assert routes.loss_sums == {}
    named = router.distilled(tokens.ids_BS).transpose(0, 1).reshape(S * B, N).argsort(descending=True)[:, :2]
    pairs = zip(named.tolist(), routes.expert_TK.tolist(), strict=True)
    assert int(routes.agree) == sum(set(a) == set(b) for a, b in pairs)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_arithmetic_is_fp32_in_a_model_that_is_cast(device, cast):
    router, hidden = make(), stream().to(cast)
    wanted = router(hidden.float(), view(), None, alone)
    model = torch.nn.ModuleList([router]).to(cast)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = router(hidden, view(), None, alone)
    assert got.gate_TK.dtype == torch.float32
    assert {loss.dtype for loss in got.loss_sums.values()} == {torch.float32}
    assert torch.equal(got.expert_TK, wanted.expert_TK)
    assert torch.equal(got.gate_TK, wanted.gate_TK)
    assert torch.equal(got.loss_sums["balance"], wanted.loss_sums["balance"])
