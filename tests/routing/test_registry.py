"""The registry of routers agrees with what is accepted, built and documented, and nobody goes around it."""

from __future__ import annotations

import ast
import pkgutil
import re
from pathlib import Path
from typing import get_args

import pytest

from stablemoe_ds.config.gate_facts import GATES, GateName
from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.config.routers import ROUTERS, RouterName
from stablemoe_ds.routing.router import Router

ROOT = Path(__file__).parents[2]
METHOD = (ROOT / "docs" / "method.md").read_text()
SYMBOLS = {
    "sigmoid": r"$\sigma(s)$",
    "doubled": r"$2\sigma(s)$",
    "learned": r"$2\sigma(a_i s + b_i)$",
    "normalized": r"$\sigma(s)$, normalised",
    "softmax": r"$\mathrm{softmax}(s)$",
    "one": "1",
}


ROUTER_TABLE = "| `moe.router` | choice | gate | balanced by | depends on the layout |"
GATE_TABLE = "| `moe.gate` | gate | at the start | learned for it |"


def documented(head: str = ROUTER_TABLE) -> dict[str, list[str]]:
    """Rows of a table of docs/method.md by the names in their first cell: the other cells."""
    _, _, after = METHOD.partition(head + "\n")
    rows = [line.strip("| ").split(" | ") for line in after.partition("\n\n")[0].splitlines()[1:]]
    return {name: row[1:] for row in rows for name in re.findall(r"`(\w+)`", row[0])}


def test_the_configuration_accepts_what_is_registered() -> None:
    assert get_args(RouterName) == tuple(ROUTERS)
    assert get_args(MoEConfig.model_fields["router"].annotation) == tuple(ROUTERS)


@pytest.mark.parametrize("name", ROUTERS)
def test_an_entry_names_a_router_if_it_has_experts(name: str) -> None:
    facts = ROUTERS[name]
    assert (facts.made_by is not None) is facts.routed
    if facts.made_by is not None:
        made_by = pkgutil.resolve_name(f"stablemoe_ds.routing.{facts.made_by}")
        assert issubclass(made_by, Router)
        assert made_by is not Router
        assert made_by.forward is not Router.forward


def test_no_file_of_routing_holds_a_router_that_nothing_names() -> None:
    import stablemoe_ds.routing as room

    for module in pkgutil.iter_modules(room.__path__):
        pkgutil.resolve_name(f"stablemoe_ds.routing.{module.name}")
    found, waiting = set(), [Router]
    while waiting:
        kinds = [kind for kind in waiting.pop().__subclasses__() if kind.__module__.startswith("stablemoe_ds.")]
        found |= {f"{kind.__module__.rpartition('.')[2]}:{kind.__name__}" for kind in kinds}
        waiting += kinds
    abstract = {"router:CentroidRouter"}
    assert found - abstract == {facts.made_by for facts in ROUTERS.values() if facts.routed}


@pytest.mark.parametrize("name", ROUTERS)
def test_the_method_describes_each_router_as_its_facts_do(name: str) -> None:
    facts, (choice, gate, balance, layout) = ROUTERS[name], documented()[name]
    assert gate == (SYMBOLS[facts.gate] if facts.routed else "none")
    assert ("table" in choice) is (facts.table_from is not None)
    assert ("loss" in balance) is (facts.balance_weight > 0)
    assert ("bias" in balance) is facts.balanced_by_bias
    assert layout == ("no" if not facts.by_micro_batch else "stage 1" if facts.distilled else "yes")
    assert re.search(rf"^### .*`{name}`", METHOD, re.MULTILINE) or name == "stablemoe", "it has a section of its own"


def test_the_method_describes_no_other_router() -> None:
    assert documented().keys() == ROUTERS.keys()


def test_the_method_describes_the_gates_that_are_accepted() -> None:
    found = documented(GATE_TABLE)
    assert list(found) == list(get_args(GateName)) == list(get_args(MoEConfig.model_fields["gate"].annotation))
    for name, (formula, start, learned) in list(found.items())[1:]:
        assert formula == SYMBOLS[name]
        assert float(start.partition(",")[0]) == GATES[name].neutral(1, 8)
        assert ("centroids" in learned) is GATES[name].affinity
        assert ("two numbers" in learned) is (GATES[name].numbers == 2)


def asks_for_a_name(node: ast.AST) -> bool:
    """``x.router == ...``, ``x.router in ...`` and ``match x.router``."""
    asked = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    asked += [node.subject] if isinstance(node, ast.Match) else []
    return any(isinstance(part, ast.Attribute) and part.attr == "router" for part in asked)


def test_nobody_asks_for_the_name_of_a_router() -> None:
    """What a router is like is asked of its facts, so that a new one needs an entry and no other change.

    The modeling file of an exported folder runs without this package: it knows kinds of choice, not routers.
    """
    assert asks_for_a_name(ast.parse("run.moe.router in ('hash', 'base')").body[0].value)  # type: ignore[attr-defined]
    found = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        for path in sorted((ROOT / "stablemoe_ds").rglob("*.py"))
        if path.name != "modeling_stablemoe.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if asks_for_a_name(node)
    ]
    assert found == []
