"""What the name of a router decides in a configuration: balance weight, stages, what may not be combined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stablemoe_ds.config.costs import flops_per_token, parameters
from stablemoe_ds.config.load import dump_run, load_run
from stablemoe_ds.config.routers import ROUTERS
from stablemoe_ds.config.rules import check, switch_step, two_stages
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError

Make = Callable[..., RunConfig]
DISTILLED = {"stablemoe", "stablemoe_balanced", "base_fixed"}


def overrides(name: str) -> list[str]:
    needed = {"dense": ["moe.layers=[]"], "table": ["moe.table=any.safetensors"]}
    return [f"moe.router={name}", *needed.get(name, [])]


def test_which_routers_are_distilled() -> None:
    assert {name for name, facts in ROUTERS.items() if facts.distilled} == DISTILLED


@pytest.mark.parametrize("name", ROUTERS)
def test_one_file_serves_all_routers(make: Make, name: str) -> None:
    """Its ``stages`` concern those that have two."""
    for stages in ("{at_step: 10}", "{never: true}", "{at_fraction: 0.5}", "{plateau: {}}"):
        check(make(*overrides(name), f"stages={stages}"), 1)
    run = make(*overrides(name))
    assert two_stages(run) is (name in DISTILLED)
    assert switch_step(run) == (10 if name in DISTILLED else 0 if name in ("hash", "table") else None)


def test_a_router_with_one_stage_needs_no_section_for_them(make: Make) -> None:
    for name in set(ROUTERS) - DISTILLED:
        check(make(*overrides(name), "stages={}"), 1)


@pytest.mark.parametrize(
    ("name", "weight"), [("stablemoe", 0.3), ("stablemoe_stage1", 0.3), ("switch", 0.01), ("topk", 0)]
)
def test_balance_weight_is_the_routers_own_unless_given(make: Make, name: str, weight: float) -> None:
    assert make(f"moe.router={name}").moe.balance_weight == weight
    assert make(f"moe.router={name}", "moe.balance_weight=0.7").moe.balance_weight == 0.7
    assert make(f"moe.router={name}", "moe.balance_weight=0").moe.balance_weight == 0


def test_a_run_reads_back_as_it_was_written(make: Make, tmp_path: Path) -> None:
    for name in ROUTERS:
        run = make(*overrides(name))
        (tmp_path / "again.yaml").write_text(dump_run(run))
        assert load_run(tmp_path / "again.yaml") == run


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("moe.router=base moe.top_k=2", "router 'base' gives each token one expert, not top_k 2: set top_k 1"),
        ("moe.router=base_fixed moe.top_k=2", "router 'base_fixed' gives each token one expert"),
        ("moe.router=stablemoe_balanced moe.top_k=2", "router 'stablemoe_balanced' gives each token one expert"),
        (
            "moe.router=stablemoe_balanced moe.distilled={kind: cnn}",
            "a cnn router has no table to balance: set distilled.kind word",
        ),
        (
            "moe.router=dense_deeper moe.shared_experts=1",
            "router 'dense_deeper' has no experts, so no shared ones either",
        ),
        ("moe.router=dense_wider moe.layers=[]", "router 'dense_wider' needs moe.layers"),
        ("moe.router=dense", "router 'dense' has no MoE layer: leave moe.layers empty"),
        ("moe.table_load=0.9", "moe.table_load"),
        ("moe.bias_step=0", "moe.bias_step"),
        ("moe.hash_table=md5", "moe.hash_table"),
        ("moe.router=swich", "moe.router"),
        (
            "moe.router=table",
            "router 'table' needs moe.table: the file of a table, which 'stablemoe table build' makes",
        ),
        ("moe.gate=softmax", "moe.gate"),
        (
            "moe.router=topk moe.gate=one",
            "gate 'one' has no gradient and it has no balance loss, so nothing trains the centroids of router 'topk'; "
            "nearest that works: gate doubled",
        ),
        ("moe.router=base_fixed moe.gate=one", "nothing trains the centroids of router 'base_fixed'"),
        ("moe.router=expert_choice moe.gate=one", "nothing trains the centroids of router 'expert_choice'"),
        ("moe.gate=one moe.balance_weight=0", "gate 'one' has no gradient and balance_weight is 0, so nothing trains"),
        ("moe.router=dense_wider moe.gate=doubled", "router 'dense_wider' has no experts to weigh: set gate own"),
    ],
)
def test_what_cannot_be_combined_is_refused(make: Make, given: str, said: str) -> None:
    first, _, rest = given.partition(" ")
    with pytest.raises(UserError) as caught:
        make(*[first] + [rest] * bool(rest))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_routers_differ_in_nothing_but_what_they_learn(make: Make) -> None:
    """The same experts and the same arithmetic; centroids for those that learn, a distilled router for some."""
    counted = {name: parameters(make(*overrides(name))) for name, facts in ROUTERS.items() if facts.routed}
    assert len({(c.shared, c.expert, c.active) for c in counted.values()}) == 1
    assert {name for name, c in counted.items() if c.router == 0} == {"hash", "table"}
    assert {name for name, c in counted.items() if c.distilled} == DISTILLED
    assert len({flops_per_token(make(*overrides(name))) for name in counted}) == 1


def test_a_gate_costs_its_centroids_and_its_numbers_and_no_arithmetic(make: Make) -> None:
    def router(*settings: str) -> int:
        return parameters(make(*settings)).router

    centroids = router("moe.router=stablemoe")
    experts = make().moe.experts * len(make().moe.layers)
    for gate, more in {"sigmoid": 0, "doubled": 0, "one": 0, "learned": 2 * experts}.items():
        assert router("moe.router=stablemoe", f"moe.gate={gate}") == centroids + more
        expected = 0 if gate == "one" else centroids + more
        assert router("moe.router=hash", f"moe.gate={gate}") == expected
        assert flops_per_token(make(f"moe.gate={gate}")) == flops_per_token(make())


def test_a_run_of_a_version_without_gates_has_the_routers_own(make: Make) -> None:
    for name in ROUTERS:
        moe = make(*overrides(name)).moe
        assert moe.gate == "own"
        assert moe.gate_name == moe.facts.gate
