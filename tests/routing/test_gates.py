"""Gates of every router, chosen or followed, against the formulas written out token by token in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stablemoe_ds.config.gate_facts import GATES
from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.config.routers import ROUTERS
from stablemoe_ds.routing.build import make_router
from stablemoe_ds.routing.gates import LearnedGate, make_gate
from stablemoe_ds.routing.router import CentroidRouter
from stablemoe_ds.routing.routes import Routes
from tests.routing.batch import VOCAB, D, N, S, T, alone, stream, tokens

NAMED = [name for name, facts in GATES.items() if not facts.own_only]
ROUTED = [name for name, facts in ROUTERS.items() if facts.routed]
REFUSED = {(name, "one") for name in ("base", "base_fixed", "topk", "expert_choice")}
ACCEPTED = [(name, gate) for name in ROUTED for gate in NAMED if (name, gate) not in REFUSED]
CHOOSING = [(name, gate) for name, gate in ACCEPTED if not ROUTERS[name].fixed]
FOLLOWING = [(name, gate) for name, gate in ACCEPTED if ROUTERS[name].table_from is not None]


def config(name: str, gate: str, **options: Any) -> MoEConfig:
    top_k = 1 if ROUTERS[name].one_expert else 2
    return MoEConfig.model_validate(
        {"router": name, "layers": [1], "experts": N, "gate": gate, "top_k": top_k, "table": "any", **options}
    )


def make(name: str, gate: str, **options: Any) -> CentroidRouter:
    """A router with random weights."""
    router = make_router(config(name, gate, **options), D, heads=2, vocab=VOCAB, positions=S)
    assert isinstance(router, CentroidRouter)
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    return router


def slow_gate(gate: str, router: CentroidRouter, affinity: Tensor, expert: int) -> Tensor:
    """The gate of one token and expert. affinity: float64 scalar."""
    if gate == "one":
        return torch.ones((), dtype=torch.float64)
    scale, bias = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    if gate == "learned":
        assert isinstance(router.gate, LearnedGate)
        scale, bias = router.gate.scale_N[expert].double(), router.gate.bias_N[expert].double()
    sigma = 1 / (1 + torch.exp(-(scale * affinity + bias)))
    return sigma if gate == "sigmoid" else 2 * sigma


def gradients(router: CentroidRouter, hidden_TD: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of the stream and of all but the distilled router; a zero where nothing arrives."""
    wanted = {n: p for n, p in router.named_parameters() if not n.startswith("distilled.")} | {"stream": hidden_TD}
    if not loss.requires_grad:
        return {n: torch.zeros_like(p) for n, p in wanted.items()}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(wanted.items(), found, strict=True)}


def assert_gates(router: CentroidRouter, gate: str, hidden_TD: Tensor, routes: Routes) -> None:
    """Each gate of ``routes``, and the gradients of their sum with random weights."""
    weight = torch.randn(routes.gate_TK.shape, generator=torch.Generator().manual_seed(6))
    fast, slow = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for t, experts in enumerate(routes.expert_TK.tolist()):
        seen = hidden_TD[t].double()
        if router.normalize:
            seen = seen / (seen.square().mean() + 1e-6).sqrt()
        for k, expert in enumerate(experts):
            if expert < 0:
                continue
            affinity = torch.zeros(()) if gate == "one" else router.centroids[expert].double() @ seen
            wanted = slow_gate(gate, router, affinity, expert)
            torch.testing.assert_close(routes.gate_TK[t, k].double(), wanted, rtol=1e-5, atol=1e-6)
            fast, slow = fast + weight[t, k] * routes.gate_TK[t, k], slow + weight[t, k] * wanted
    got, wanted_grads = gradients(router, hidden_TD, fast), gradients(router, hidden_TD, slow)
    assert got.keys() == wanted_grads.keys()
    for name, gradient in wanted_grads.items():
        torch.testing.assert_close(got[name], gradient.float(), rtol=1e-4, atol=1e-5)
    moved = {name for name, gradient in got.items() if gradient.any()}
    learned = {"gate.scale_N", "gate.bias_N"} if gate == "learned" else set()
    assert moved == (set() if gate == "one" else {"stream", "centroids"} | learned)


@pytest.mark.parametrize("router_input", ["raw", "normalized"])
@pytest.mark.parametrize(("name", "gate"), CHOOSING)
def test_gates_of_chosen_routes(name: str, gate: str, router_input: str) -> None:
    router, hidden = make(name, gate, router_input=router_input), stream(scale=0.5).requires_grad_()
    assert_gates(router, gate, hidden, router(hidden, tokens(padding=True), None, alone))


@pytest.mark.parametrize("router_input", ["raw", "normalized"])
@pytest.mark.parametrize(("name", "gate"), FOLLOWING)
def test_gates_of_followed_routes(name: str, gate: str, router_input: str) -> None:
    router, hidden = make(name, gate, router_input=router_input), stream(scale=0.5).requires_grad_()
    random = torch.Generator().manual_seed(3)
    fixed_TK = torch.stack([torch.randperm(N, generator=random)[: router.top_k] for _ in range(T)])
    view = tokens(padding=True)
    routes = router(hidden, view, fixed_TK, alone)
    assert torch.equal(routes.expert_TK[view.real_T], fixed_TK[view.real_T])
    assert routes.loss_sums == {}
    if ROUTERS[name].fixed and gate == "one":
        assert list(router.parameters()) == []
    else:
        assert_gates(router, gate, hidden, routes)


@pytest.mark.parametrize(("name", "gate"), CHOOSING)
def test_the_gate_changes_neither_choice_nor_losses(name: str, gate: str) -> None:
    """The same experts, the same losses and the same gradients of the losses, whatever the gate."""
    found = []
    for kind in ("own", gate):
        router, hidden = make(name, "own"), stream(scale=0.5).requires_grad_()
        router.gate = make_gate(config(name, kind))
        for parameter in router.gate.parameters() if router.gate else ():
            torch.nn.init.normal_(parameter)
        routes = router(hidden, tokens(), None, alone)
        total = sum(routes.loss_sums.values(), torch.zeros(()))
        inputs = [hidden, *(p for n, p in router.named_parameters() if not n.startswith("gate."))]
        grads = torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else ()
        found.append((routes.expert_TK, *routes.loss_sums.values(), *(g for g in grads if g is not None)))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gate", ["doubled", "learned", "one"])
def test_the_balance_loss_is_equation_8_with_sigma(gate: str) -> None:
    router, hidden = make("stablemoe", gate, router_input="raw"), stream(scale=0.5)
    routes = router(hidden, tokens(), None, alone)
    wanted, mean = 0.0, T * 2 / N
    for t, experts in enumerate(routes.expert_TK.tolist()):
        for expert in experts:
            excess = (int(routes.counts_N[expert]) - mean) / mean
            wanted += excess / (1 + math.exp(-float(router.centroids[expert] @ hidden[t])))
    assert float(routes.loss_sums["balance"].detach()) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_a_learned_gate_starts_as_a_doubled_one() -> None:
    doubled, learned = make("stablemoe", "doubled"), make("stablemoe", "learned")
    assert isinstance(learned.gate, LearnedGate)
    learned.load_state_dict(
        doubled.state_dict() | {"gate.scale_N": torch.ones(N), "gate.bias_N": torch.zeros(N)}, strict=True
    )
    gates = [router(stream(), tokens(), None, alone).gate_TK for router in (doubled, learned)]
    assert torch.equal(*gates)


@pytest.mark.parametrize("name", ROUTED)
def test_the_routers_own_gate_by_its_name_is_its_own(name: str) -> None:
    assert make_gate(config(name, "own")) is None
    if ROUTERS[name].gate in NAMED:
        assert make_gate(config(name, ROUTERS[name].gate)) is None


def test_gates_stay_fp32_in_a_model_that_is_cast() -> None:
    router, hidden = make("hash", "learned"), stream().bfloat16()
    fixed_TK = torch.arange(T)[:, None].repeat(1, 2) % N
    wanted = router(hidden.float(), tokens(), fixed_TK, alone).gate_TK
    model = torch.nn.ModuleList([router]).to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = router(hidden, tokens(), fixed_TK, alone).gate_TK
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted)


def test_neutral_gates_are_those_of_affinities_of_zero() -> None:
    """What upcycling divides by, against tokens of zeros: all experts are equally good for them."""
    for name, gate in [*ACCEPTED, *((name, "own") for name in ROUTED)]:
        router, moe = make(name, gate), config(name, gate)
        if isinstance(router.gate, LearnedGate):
            torch.nn.init.ones_(router.gate.scale_N)
            torch.nn.init.zeros_(router.gate.bias_N)
        fixed_TK = torch.tensor([[0, 2][: router.top_k]] * T)
        total_T = router(torch.zeros(T, D), tokens(), fixed_TK, alone).gate_TK.sum(1)
        assert total_T.tolist() == pytest.approx([moe.gate_facts.neutral(moe.top_k, N)] * T), (name, gate)
