"""``moe.table_layers``: what is refused, in words that name a way out, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest

from stablemoe_ds.config.costs import parameters
from tests.tiny import VOCAB, tiny_run

MIXED: dict[str, Any] = {"router": "topk", "table": "even", "table_layers": [2]}


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ({"table": None}, "moe.table_layers needs moe.table: .* random, even, scattered, cooccurrence"),
        ({"table_layers": [3, 2]}, r"table_layers must ascend without repeats; nearest that works: \[2, 3\]"),
        ({"table_layers": [1, 2]}, r"\[1, 2\] are not all among layers \[2, 3\]; nearest that works: \[2\]"),
        ({"table_layers": [2, 3]}, r"'topk' has none to learn in: set router table, or take one out, e.g. \[2\]"),
        ({"router": "hash"}, "'hash' follows a table in every layer: leave table_layers empty"),
        ({"router": "dense_wider"}, "'dense_wider' has no layer that could follow a table"),
        ({"router": "stablemoe", "distilled": {"kind": "cnn"}}, "cnn routers never become a table"),
        ({"table_options": {"max_load": 2}}, "unknown option max_load"),
    ],
    ids=str,
)
def test_what_cannot_be_mixed(moe: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_run(moe=MIXED | moe)


def test_layers_by_what_chooses_in_them() -> None:
    mixed, learned, fixed = (tiny_run(moe=moe).moe for moe in (MIXED, {}, {"router": "hash"}))
    assert (mixed.fixed_layers, mixed.learned_layers, mixed.restless_rows) == ([2], [3], [1])
    assert (learned.fixed_layers, learned.learned_layers, learned.restless_rows) == ([], [2, 3], [0, 1])
    assert (fixed.fixed_layers, fixed.learned_layers, fixed.restless_rows) == ([2, 3], [], [0, 1])


def test_each_layer_costs_what_its_own_router_has() -> None:
    """Width 32, four experts: centroids where they choose or weigh, a distilled router where a switch will need it."""
    distilled = VOCAB * 50 + 4 * 50
    for moe, router, ids in (
        (MIXED, 2 * 4 * 32, 0),
        (MIXED | {"router": "switch", "gate": "one"}, 4 * 32, 0),
        (MIXED | {"router": "stablemoe"}, 2 * 4 * 32, distilled),
    ):
        counts = parameters(tiny_run(moe=moe))
        assert (counts.router, counts.distilled) == (router, ids)
