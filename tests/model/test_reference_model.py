"""The whole model against the slow reference: losses, routes and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.routing.fixed import freeze
from tests.model.reference import SlowModel, balance_sum
from tests.tiny import VOCAB

PAPER = {"positions": "learned", "norm": "layernorm", "activation": "relu", "bias": True, "kv_heads": None}
SHAPES = {
    "paper": {"model": PAPER, "moe": {"sublayers": 2}},
    "paper, untied, plain, gelu": {
        "model": {**PAPER, "tie_embeddings": False, "embedding": "plain", "activation": "gelu"},
        "moe": {"router_input": "normalized"},
    },
    "paper, top 2, shared": {"model": PAPER, "moe": {"top_k": 2, "shared_experts": 2}},
    "modern": {},
    "modern, replace, top 2, shared": {
        "moe": {"placement": "replace", "top_k": 2, "shared_experts": 1, "sublayers": 2}
    },
}


@pytest.fixture(params=SHAPES)
def model(request, build):
    return build(**SHAPES[request.param]).train()


def padded_batch(seed: int = 5) -> Batch:
    """Three sequences of 16, the last 4 positions of the first and all of the third are padding."""
    ids = torch.randint(VOCAB, (3, 17), generator=torch.Generator().manual_seed(seed))
    real = torch.ones(3, 16, dtype=torch.bool)
    real[0, 12:] = False
    real[2] = False
    scored = real.clone()
    scored[:, 0] = False  # not the same tokens that are routed
    return Batch(ids[:, :-1], ids[:, 1:], real, scored)


def close(got: torch.Tensor, wanted: torch.Tensor, name: str = "") -> None:
    torch.testing.assert_close(
        got.double(), wanted, rtol=2e-4, atol=2e-5 * (1 + float(wanted.abs().max())), msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("frozen", [False, True], ids=["stage 1", "stage 2"])
def test_losses_routes_and_gradients(model, whole_weights, frozen):
    run, batch = model.run_config, padded_batch()
    weights = {name: w.double().requires_grad_() for name, w in whole_weights(model).items()}
    slow = SlowModel(run, weights)(batch, frozen)
    fixed = freeze(model.distilled_routers, run.moe.top_k, tuple(run.moe.layers))(batch.ids) if frozen else {}
    fast = model(batch, fixed)

    for layer, report in enumerate(fast.layers):
        routes = {(b, s): report.expert_TK[s * 3 + b].tolist() for b in range(3) for s in range(16) if batch.real[b, s]}
        assert routes == slow.choices[layer]
        assert (report.expert_TK.view(16, 3, -1).transpose(0, 1)[~batch.real] == -1).all()
    close(fast.loss_sum, slow.loss_sum)
    total, slow_total = fast.loss_sum, slow.loss_sum
    if frozen:
        assert fast.auxiliary_sum("balance") is None
        assert fast.auxiliary_sum("distill") is None
    else:
        close(fast.auxiliary_sum("balance"), balance_sum([slow], run.moe.experts))
        close(fast.auxiliary_sum("distill"), slow.distill_sum)
        total = total + 0.7 * fast.auxiliary_sum("balance") + 0.4 * fast.auxiliary_sum("distill")
        slow_total = slow_total + 0.7 * balance_sum([slow], run.moe.experts) + 0.4 * slow.distill_sum
    total.backward()
    slow_total.backward()
    wanted = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}
    got = whole_weights(model, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    assert got.keys() == wanted.keys()
    for name in wanted:
        close(got[name], wanted[name], name)
    reached = [name for name in wanted if wanted[name].any()]
    assert len(reached) > 0.6 * len(wanted), "a reference without gradients proves nothing"


def test_logits_and_loss(model, whole_weights):
    batch = padded_batch()
    batch = Batch(batch.ids, batch.labels, torch.ones_like(batch.real), batch.scored)
    run = model.run_config
    fixed = freeze(model.distilled_routers, run.moe.top_k, tuple(run.moe.layers))(batch.ids)
    with torch.no_grad():
        out = model(batch, fixed)
        logits = model.eval().logits(batch.ids, fixed)
        slow = SlowModel(run, {name: w.double() for name, w in whole_weights(model).items()})(batch, frozen=True)
    close(logits, slow.logits_BSV)
    each = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view(3, 16)
    torch.testing.assert_close(out.loss_BS, each)
    torch.testing.assert_close(out.loss_sum, each[batch.scored].sum())


@pytest.mark.parametrize("position", [1, 7, 15])
def test_no_position_sees_a_later_id(model, position):
    batch, run = padded_batch(), model.run_config
    other = batch.ids.clone()
    other[:, position:] = (other[:, position:] + 1) % VOCAB
    freezing = freeze(model.distilled_routers, run.moe.top_k, tuple(run.moe.layers))
    model.eval()
    with torch.no_grad():
        before, after = (model.logits(ids, freezing(ids)) for ids in (batch.ids, other))
    torch.testing.assert_close(before[:, :position], after[:, :position], rtol=0, atol=1e-6)
    assert (before[:, position] - after[:, position]).abs().max() > 1e-3
