"""Every name of the configuration makes its router, with what the facts about it say."""

from __future__ import annotations

from typing import Any

import pytest

from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.config.routers import ROUTERS
from stablemoe_ds.routing.base_layers import BaseLayersRouter
from stablemoe_ds.routing.build import make_router
from stablemoe_ds.routing.expert_choice import ExpertChoiceRouter
from stablemoe_ds.routing.hashed import HashRouter
from stablemoe_ds.routing.router import CentroidRouter, Router
from stablemoe_ds.routing.stablemoe import StableMoERouter
from stablemoe_ds.routing.switch import SwitchRouter
from stablemoe_ds.routing.topk import TopKRouter

CLASSES = {
    "stablemoe": StableMoERouter,
    "stablemoe_balanced": StableMoERouter,
    "stablemoe_stage1": StableMoERouter,
    "base": BaseLayersRouter,
    "base_fixed": BaseLayersRouter,
    "switch": SwitchRouter,
    "hash": HashRouter,
    "table": HashRouter,
    "topk": TopKRouter,
    "expert_choice": ExpertChoiceRouter,
}


def make(name: str, **options: Any) -> Router:
    moe = MoEConfig.model_validate({"router": name, "layers": [1], "experts": 6, "table": "any", **options})
    return make_router(moe, hidden_size=16, heads=2, vocab=30, positions=8)


@pytest.mark.parametrize("name", CLASSES)
def test_a_name_makes_its_router(name: str) -> None:
    router, facts = make(name), ROUTERS[name]
    assert type(router) is CLASSES[name]
    assert (router.experts, router.top_k) == (6, 1)
    assert (router.distilled is not None) is facts.distilled
    assert isinstance(router, CentroidRouter)
    assert (router.centroids is None) is facts.fixed


def test_every_router_with_experts_has_a_name() -> None:
    assert set(CLASSES) == {name for name, facts in ROUTERS.items() if facts.routed}


@pytest.mark.parametrize("name", ["dense_deeper", "dense_wider"])
def test_a_dense_stack_has_no_router(name: str) -> None:
    with pytest.raises(ValueError, match=f"router {name} has no experts to choose from"):
        make(name)


@pytest.mark.parametrize("name", ["stablemoe", "switch", "topk", "expert_choice", "base"])
def test_options_reach_the_router(name: str) -> None:
    options = {"router_input": "normalized"} | ({"top_k": 3} if name != "base" else {})
    router = make(name, **options)
    assert isinstance(router, CentroidRouter)
    assert router.normalize
    assert router.top_k == options.get("top_k", 1)
    assert router.centroids.shape == (6, 16)


def test_the_step_of_the_bias_and_the_kind_of_distilled_router_reach_theirs() -> None:
    topk, base = make("topk", bias_step=0.5), make("base_fixed", distilled={"kind": "cnn", "dim": 7})
    assert isinstance(topk, TopKRouter)
    assert topk.bias_step == 0.5
    assert base.distilled is not None
    assert (base.distilled.kind, base.distilled.centroids.shape[1]) == ("cnn", 7)
