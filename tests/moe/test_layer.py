"""The MoE layer against a dense reference that asks every expert about every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stablemoe_ds.moe.expert_offsets import ExpertOffsets
from stablemoe_ds.moe.experts import ExpertShape
from stablemoe_ds.moe.routing_pass import RoutingPass
from stablemoe_ds.routing.distilled import DistilledRouter
from stablemoe_ds.routing.routes import TokenView
from stablemoe_ds.routing.stablemoe import StableMoERouter

S, B, D, N, VOCAB = 6, 4, 8, 4, 20
SHAPE = ExpertShape(D, 12, 2, "relu", "layernorm", 1e-5, True)


def make(
    top_k: int = 1, shared: bool = False, capacity: float | None = None, fresh: bool = False, parts: int = 1
) -> Any:
    from stablemoe_ds.distributed.placement import LayerPlacement
    from stablemoe_ds.moe.layer import MoELayer

    torch.manual_seed(3)
    distilled = DistilledRouter("word", VOCAB, N, dim=5, layers=1, width=D, heads=2, positions=S)
    router = StableMoERouter(D, N, top_k, False, distilled)
    placement = LayerPlacement(1, 0, None, lambda counts: counts)
    beside = ExpertShape(D, 24, 2, "relu", "layernorm", 1e-5, True) if shared else None
    layer = MoELayer(router, SHAPE, placement, block=2, index=0, shared=beside, capacity_factor=capacity, parts=parts)
    for name, parameter in layer.named_parameters():
        if not (fresh and name.endswith(("w2", "b2"))):
            torch.nn.init.normal_(parameter, std=0.5)
    return layer


def inputs(pads: bool = True) -> tuple[Tensor, TokenView]:
    random = torch.Generator().manual_seed(4)
    real_T = torch.rand(S * B, generator=random) > 0.3 if pads else torch.ones(S * B, dtype=torch.bool)
    ids_BS = torch.randint(VOCAB, (B, S), generator=random)
    return torch.randn(S, B, D, generator=random), TokenView(ids_BS, real_T)


def dense_reference(layer: Any, hidden_SBD: Tensor, real_T: Tensor, chosen: list[list[int]] | None = None) -> Tensor:
    """Every expert serves every token; a mask then keeps what was chosen."""
    hidden_TD = hidden_SBD.reshape(-1, D)
    scores_TN = hidden_TD @ layer.router.centroids.T
    alone = [ExpertOffsets.of([len(hidden_TD) * (e == i) for e in range(N)]) for i in range(N)]
    stacks = torch.stack([layer.experts(hidden_TD, offsets) for offsets in alone])
    keep_TN = torch.zeros(S * B, N)
    for t in range(S * B):
        best = chosen[t] if chosen else scores_TN[t].argsort(descending=True)[: layer.router.top_k]
        keep_TN[t, best] = float(real_T[t])
    out = hidden_TD + torch.einsum("tn,tn,ntd->td", keep_TN, scores_TN.sigmoid(), stacks)
    if layer.shared is not None:
        out = out + layer.shared(hidden_TD, ExpertOffsets.of([len(hidden_TD)]))
    return out.view_as(hidden_SBD)


@pytest.mark.parametrize("fixed", [False, True], ids=["learned", "known"])
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize(("top_k", "parts"), [(1, 1), (2, 1), (4, 1), (2, 3)])
def test_output_and_gradients_equal_the_dense_reference(top_k, parts, shared, fixed):
    layer, (hidden, tokens) = make(top_k, shared, parts=parts), inputs()
    routes = torch.rand(S * B, N, generator=torch.Generator().manual_seed(6)).argsort(1)[:, :top_k]
    weight = torch.linspace(-1, 1, D)
    sides = []
    for slow in (False, True):
        layer.zero_grad()
        x = hidden.clone().requires_grad_()
        if slow:
            out = dense_reference(layer, x, tokens.real_T, routes.tolist() if fixed else None)
        else:
            out, report = layer(x, RoutingPass(tokens, {2: routes} if fixed else {}))
        (out * weight).sum().backward()
        sides.append([out.detach(), x.grad, *(p.grad for p in (layer.router.centroids, *layer.experts.parameters()))])
    for got, wanted in zip(*sides, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)

    assert report.block == 2
    assert int(report.dropped) == 0
    routed = report.expert_TK[tokens.real_T]
    assert report.served_N.tolist() == [int((routed == e).sum()) for e in range(N)]
    assert bool(report.loss_sums) is not fixed


def test_a_token_may_have_fewer_experts_than_others_or_none():
    """As where experts choose: columns without an expert add nothing, and who has none at all is counted."""
    layer, (hidden, tokens) = make(3), inputs()
    random = torch.Generator().manual_seed(6)
    routes = torch.rand(S * B, N, generator=random).argsort(1)[:, :3]
    routes[torch.rand(S * B, 3, generator=random) < 0.5] = -1
    out, report = layer(hidden, RoutingPass(tokens, {2: routes}))
    chosen = [[e for e in row if e >= 0] for row in routes.tolist()]
    torch.testing.assert_close(out, dense_reference(layer, hidden, tokens.real_T, chosen), rtol=1e-4, atol=1e-5)
    real = tokens.real_T.tolist()
    assert int(report.unserved) == sum(keep and not row for keep, row in zip(real, chosen, strict=True)) > 0
    assert int(report.served_N.sum()) == sum(len(row) for keep, row in zip(real, chosen, strict=True) if keep)


def test_padding_passes_unchanged_but_for_the_shared_expert():
    hidden, tokens = inputs()
    for shared in (False, True):
        layer = make(2, shared)
        out, _ = layer(hidden, RoutingPass(tokens))
        pads = ~tokens.real_T
        wanted = hidden.view(-1, D)[pads]
        if shared:
            wanted = wanted + layer.shared(wanted, ExpertOffsets.of([int(pads.sum())]))
        assert torch.equal(out.view(-1, D)[pads], wanted)
        assert not torch.equal(out.view(-1, D)[~pads], hidden.view(-1, D)[~pads])


def test_a_fresh_layer_is_the_identity():
    hidden, tokens = inputs(pads=False)
    layer = make(2, shared=True, fresh=True)
    for sublayer in (*layer.experts.sublayers, *layer.shared.sublayers):
        torch.nn.init.zeros_(sublayer.w2)
        torch.nn.init.zeros_(sublayer.b2)
    assert torch.equal(layer(hidden, RoutingPass(tokens))[0], hidden)


def test_gate_is_fp32_and_the_stream_keeps_its_precision():
    layer, (hidden, tokens) = make().bfloat16(), inputs()
    gates = []
    layer.router.register_forward_hook(lambda _module, _args, routes: gates.append(routes.gate_TK))
    out, report = layer(hidden.bfloat16(), RoutingPass(tokens))
    assert out.dtype == torch.bfloat16
    assert gates[0].dtype == report.loss_sums["balance"].dtype == torch.float32
    reference = dense_reference(layer.float(), hidden.bfloat16().float(), tokens.real_T)
    torch.testing.assert_close(out.float(), reference, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1])
def test_beyond_capacity_tokens_pass_unchanged(factor, top_k):
    layer, (hidden, tokens) = make(top_k, capacity=factor), inputs()
    free = make(top_k)  # same weights, no capacity
    out, report = layer(hidden, RoutingPass(tokens, seed=5))
    counts = report.served_N.tolist()
    capacity = -(-sum(counts) * int(factor * 100) // (100 * N))  # rounded up, in whole numbers
    assert int(report.dropped) == sum(max(0, count - capacity) for count in counts) > 0

    flat, whole = out.view(-1, D), free(hidden, RoutingPass(tokens))[0].view(-1, D)
    real = tokens.real_T
    if top_k == 1:
        unchanged_T = (flat == hidden.view(-1, D)).all(1)
        assert int((unchanged_T & real).sum()) == int(report.dropped)
        torch.testing.assert_close(flat[~unchanged_T], whole[~unchanged_T])
        served = report.expert_TK[~unchanged_T & real].flatten().tolist()
        assert [served.count(e) for e in range(N)] == [min(count, capacity) for count in counts]
    else:
        differs_T = ~torch.isclose(flat, whole, atol=1e-6).all(1)
        assert 0 < int(differs_T.sum()) <= int(report.dropped)


def test_the_draw_chooses_the_victims_and_recomputation_the_same_ones():
    layer, (hidden, tokens) = make(capacity=0.5), inputs()
    outs = [layer(hidden, RoutingPass(tokens, seed=seed))[0] for seed in (5, 5, 6)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    grads = []
    for recompute in (False, True):
        x, routing = hidden.clone().requires_grad_(), RoutingPass(tokens, seed=5)
        out = checkpoint(layer, x, routing, use_reentrant=False) if recompute else layer(x, routing)
        out[0].square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_evaluation_drops_nothing():
    layer, (hidden, tokens) = make(capacity=0.5).eval(), inputs()
    with torch.no_grad():
        out, report = layer(hidden, RoutingPass(tokens))
        assert torch.equal(out, make().eval()(hidden, RoutingPass(tokens))[0])
    assert int(report.dropped) == 0


def test_no_token_at_all():
    """A batch of padding: nothing moves, every weight gets a gradient of zero."""
    layer, (hidden, tokens) = make(2, capacity=1.0), inputs()
    x = hidden.clone().requires_grad_()
    out, report = layer(x, RoutingPass(TokenView(tokens.ids_BS, torch.zeros(S * B, dtype=torch.bool))))
    assert torch.equal(out, x)
    (out.sum() + sum(report.loss_sums.values())).backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert all(p.grad is not None and not p.grad.any() for p in layer.experts.parameters())
    assert report.served_N.tolist() == [0] * N


def test_experts_must_divide_over_ranks():
    from stablemoe_ds.distributed.placement import LayerPlacement
    from stablemoe_ds.moe.layer import MoELayer

    with pytest.raises(ValueError, match="4 experts cannot be divided over 3"):
        MoELayer(make().router, SHAPE, LayerPlacement(3, 0, None, lambda counts: counts), block=1, index=0)
