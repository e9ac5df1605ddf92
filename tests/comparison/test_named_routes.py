"""The column ``table`` of a comparison: two runs whose routes are fixed differently never read alike."""

from __future__ import annotations

from typing import Any

import pytest

from stablemoe_ds.comparison.outcome import _table
from tests.tiny import tiny_run

TABLE: dict[str, Any] = {"router": "table"}
NAMED: list[tuple[dict[str, Any], str]] = [
    ({"router": "hash"}, "random"),
    ({"router": "hash", "hash_table": "even"}, "even"),
    (TABLE | {"table": "cooccurrence"}, "cooccurrence"),
    (TABLE | {"table": "cooccurrence", "table_options": {"choice": "greedy"}}, "cooccurrence choice=greedy"),
    (TABLE | {"table": "cooccurrence", "table_options": {"window": 2}}, "cooccurrence window=2"),
    (
        TABLE | {"table": "cooccurrence", "table_options": {"max_load": 1.1, "window": 2}},
        "cooccurrence window=2 max_load=1.1",
    ),
    (TABLE | {"table": "scattered", "table_options": {"window": 2}}, "scattered window=2"),
    (TABLE | {"table": "/data/tables/like-together.safetensors"}, "like-together"),
    (TABLE | {"table": "runs/small/routing_table.safetensors"}, "table of runs/small"),
    (TABLE | {"table": "runs/smaller/routing_table.safetensors"}, "table of runs/smaller"),
    ({"router": "switch"}, "none"),
    ({"router": "dense", "layers": []}, ""),
    ({}, "distilled"),
    ({"distilled": {"kind": "cnn"}}, "distilled cnn"),
    ({"router": "stablemoe_balanced"}, "distilled, balanced to 1.1"),
    ({"router": "stablemoe_balanced", "table_load": 1.05}, "distilled, balanced to 1.05"),
    ({"start_table": "cooccurrence", "table_options": {"dims": 8}}, "distilled, from cooccurrence dims=8"),
    ({"router": "topk", "table_layers": [2], "table": "tables/even.safetensors"}, "even at blocks 2"),
    (
        {"table_layers": [2], "table": "scattered", "table_options": {"dims": 8}},
        "scattered dims=8 at blocks 2, distilled",
    ),
]


@pytest.mark.parametrize(("moe", "said"), NAMED, ids=[said or "dense" for _, said in NAMED])
def test_what_fixes_the_routes(moe: dict[str, Any], said: str) -> None:
    assert _table(tiny_run(moe=moe)) == said


def test_no_two_of_them_read_alike() -> None:
    assert len({said for _, said in NAMED}) == len(NAMED)


def test_an_option_that_is_the_default_is_no_difference() -> None:
    """Nor is the order of options, or how a number is written."""
    plain, given = (
        _table(tiny_run(moe=TABLE | {"table": "cooccurrence", "table_options": options}))
        for options in ({"power": 1, "window": 2}, {"choice": "balanced", "window": 2, "max_load": 1.3, "power": 1.0})
    )
    assert plain == given == "cooccurrence window=2 power=1.0"
