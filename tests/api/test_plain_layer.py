"""An MoE layer in somebody's own torch model, against every expert asked about every token."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stablemoe_ds import MoELayer, RoutingTable, UserError

B, S, D, N, V = 3, 5, 8, 4, 20


def make(**options: Any) -> MoELayer:
    """A layer whose experts add something."""
    layer = MoELayer(D, **{"ffn_hidden_size": 12, "vocab_size": V, "experts": N, "seed": 3, **options})
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.3)
    return layer


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(4)
    real_BS = torch.rand(B, S, generator=random) > 0.3
    return torch.randn(B, S, D, generator=random), torch.randint(V, (B, S), generator=random), real_BS


def served_slowly(layer: MoELayer, token_D: Tensor, expert: int) -> Tensor:
    """What one expert adds to one token: W2 (silu(W_gate x) * W_up x) of the normalized x, its gate a sigmoid."""
    weights = layer.layer.experts.sublayers[0]
    x = F.rms_norm(token_D, (D,), weights.norm_weight[expert], 1e-5)
    gate, up = (weights.w1[expert] @ x).chunk(2)
    return torch.sigmoid(token_D @ layer.layer.router.centroids[expert]) * (weights.w2[expert] @ (F.silu(gate) * up))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("frozen", [False, True], ids=["learned", "frozen"])
def test_each_token_gets_what_its_experts_add(top_k: int, frozen: bool) -> None:
    layer, (hidden, ids, real) = make(top_k=top_k), inputs()
    table = layer.freeze() if frozen else None
    out, report = layer(hidden, ids, real)
    for b in range(B):
        for s in range(S):
            token = hidden[b, s]
            scores = layer.layer.router.centroids @ token
            chosen = scores.argsort(descending=True)[:top_k].tolist() if table is None else None
            if table is not None:
                chosen = table.expert_LVK[0, int(ids[b, s])].tolist()
            assert report.expert_BSK[b, s].tolist() == (chosen if real[b, s] else [-1] * top_k)
            wanted = token + sum(served_slowly(layer, token, e) for e in chosen) if real[b, s] else token
            torch.testing.assert_close(out[b, s], wanted)
    assert int(report.served_N.sum()) == int(real.sum()) * top_k


def test_losses_are_means_over_real_tokens_times_their_weights() -> None:
    layer, (hidden, ids, real) = make(balance_weight=0.5, distill_weight=2.0), inputs()
    _, report = layer(hidden, ids, real)
    chosen, tokens = report.expert_BSK[real][:, 0], hidden[real]
    counts = torch.tensor([(chosen == e).sum() for e in range(N)]).float()
    gate = torch.sigmoid((tokens * layer.layer.router.centroids[chosen]).sum(-1))
    balance = ((counts / counts.mean() - 1)[chosen] * gate).mean()  # eq. 8
    distill = F.cross_entropy(layer.layer.router.distilled(ids)[real], chosen)  # eq. 10
    torch.testing.assert_close(report.losses["balance"], balance.detach())
    torch.testing.assert_close(report.losses["distill"], distill.detach())
    torch.testing.assert_close(report.loss, 0.5 * balance + 2 * distill)
    layer.eval()
    assert float(layer(hidden, ids, real)[1].loss) == 0


def test_a_frozen_layer_is_saved_as_one_and_its_routing_has_no_gradient() -> None:
    layer, (hidden, ids, _) = make(), inputs()
    layer.freeze()
    other = make(seed=9)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    out, report = other(hidden, ids)
    assert torch.equal(out, layer(hidden, ids)[0])
    assert report.losses == {}
    out.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in other.layer.router.distilled.parameters())
    other.load_state_dict(make().state_dict())
    assert other.layer.router.distilled.centroids.requires_grad
    assert "balance" in other(hidden, ids)[1].losses


def test_a_table_from_elsewhere_is_followed() -> None:
    table = RoutingTable(np.random.default_rng(1).integers(0, N, (2, V, 1), dtype=np.int32), N, (2, 4))
    layer, (hidden, ids, _) = make(router="hash"), inputs()
    layer.follow(table, layer=1)
    assert layer(hidden, ids)[1].expert_BSK[..., 0].tolist() == table.expert_LVK[1, ids.numpy(), 0].tolist()


def test_a_bias_follows_the_load() -> None:
    layer, (hidden, _, _) = make(router="topk", vocab_size=None, bias_step=0.5), inputs()
    _, report = layer(hidden)
    before = layer.layer.router.bias_N.clone()
    layer.after_update(report, report)
    load = 2 * report.served_N.float()
    torch.testing.assert_close(layer.layer.router.bias_N, before + 0.5 * torch.sign(load.mean() - load))


def test_a_fresh_layer_is_the_identity_and_follows_its_seed() -> None:
    hidden, ids, _ = inputs()
    layers = [MoELayer(D, ffn_hidden_size=12, vocab_size=V, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(layers[0](hidden, ids)[0], hidden)
    first = [layer.layer.experts.sublayers[0].w1 for layer in layers]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    torch.manual_seed(1)
    one, other = (MoELayer(D, ffn_hidden_size=12, vocab_size=V) for _ in range(2))
    assert not torch.equal(one.layer.experts.sublayers[0].w1, other.layer.experts.sublayers[0].w1)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no vocabulary": ({"vocab_size": None}, "router 'stablemoe' needs token ids, but vocab_size is missing"),
    "a name": ({"router": "swich"}, 'MoELayer: moe.router: got "swich": expected stablemoe'),
    "no such setting": ({"expert": 3}, "MoELayer: moe.expert: unknown key; did you mean moe.experts?"),
    "dense": ({"router": "dense_deeper"}, "moe.router: got 'dense_deeper', which has no experts"),
    "a file": ({"router": "table", "table": "x.safetensors"}, "nearest that works: router='hash', and follow("),
    "a table in vain": ({"table": "x.safetensors"}, "moe.table: got 'x.safetensors'; nearest that works: follow("),
    "several layers": ({"layers": [1, 2]}, "moe.layers: got [1, 2], but this is one layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_work_is_refused_in_one_line(case: str) -> None:
    options, expected = REFUSED[case]
    with pytest.raises(UserError, match=re.escape(expected)) as told:
        make(**options)
    assert "\n" not in str(told.value)


def test_calls_that_lack_something_are_refused() -> None:
    hidden, ids, _ = inputs()
    with pytest.raises(UserError, match="needs token ids: call the layer with hidden states and their ids"):
        make()(hidden)
    with pytest.raises(UserError, match="'hash' follows a table from the first call"):
        make(router="hash")(hidden, ids)
    with pytest.raises(UserError, match="learns no table to freeze"):
        make(router="switch", vocab_size=None).freeze()
    table = RoutingTable(np.zeros((1, V, 1), np.int32), N + 1, (1,))
    with pytest.raises(UserError, match="the routing table has experts 5, this layer 4"):
        make().follow(table)
    with pytest.raises(UserError, match="'switch' follows no table"):
        make(router="switch", vocab_size=V).follow(RoutingTable(np.zeros((1, V, 1), np.int32), N, (1,)))
