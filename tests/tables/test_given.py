"""A table in a file is followed by the runs it fits, and refused by all others, with a line for each reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.builders import random_table
from stablemoe_ds.tables.given import given_table
from stablemoe_ds.tables.table import RoutingTable

SHAPE: dict[str, Any] = {"experts": 4, "top_k": 2, "blocks": (2, 5), "vocab_size": 50, "tokenizer": "ab" * 32}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    RoutingTable(random_table(50, 4, 2, 2, seed=3), 4, (1, 2), "ab" * 32).save(tmp_path / "table.safetensors")
    return tmp_path / "table.safetensors"


def test_its_layers_are_taken_in_order_whichever_blocks_they_were_made_for(path: Path) -> None:
    table = given_table(path, **SHAPE)
    assert np.array_equal(table.expert_LVK, random_table(50, 4, 2, 2, seed=3))
    assert (table.blocks, table.experts, table.tokenizer) == ((2, 5), 4, "ab" * 32)


def test_of_a_table_of_more_layers_those_of_the_same_blocks_are_taken(path: Path) -> None:
    table = given_table(path, **SHAPE | {"blocks": (2,)})
    assert np.array_equal(table.expert_LVK, random_table(50, 4, 2, 2, seed=3)[1:])
    assert table.blocks == (2,)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokenizer": "cd" * 32}, "is for ids of tokenizer abababababab, but the run has tokenizer cdcdcdcdcdcd"),
        ({"tokenizer": ""}, "is for ids of tokenizer abababababab, but the run has no tokenizer"),
        ({"vocab_size": 64}, "has 50 ids, but model.vocab_size is 64: expected the same"),
        ({"experts": 8}, "is for 4 experts, but moe.experts is 8; nearest that works: 4"),
        ({"top_k": 1}, "gives an id 2 experts, but moe.top_k is 1; nearest that works: 2"),
        ({"blocks": (3,)}, "has the layers of blocks [1, 2], but the run follows it at [3]"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        given_table(path, **SHAPE | changed)
    assert str(caught.value).startswith(f"moe.table: {path} {said}")
    assert "\n" not in str(caught.value)


def test_each_reason_has_a_line(path: Path) -> None:
    with pytest.raises(UserError) as caught:
        given_table(path, experts=8, top_k=1, blocks=(3,), vocab_size=51, tokenizer="")
    assert len(str(caught.value).splitlines()) == 5


def test_what_is_not_known_is_not_checked(path: Path) -> None:
    given_table(path, **SHAPE | {"vocab_size": None, "tokenizer": None})


def test_a_missing_and_a_damaged_file_are_named(path: Path) -> None:
    with pytest.raises(UserError, match=r"moe.table: .*missing.* 'stablemoe table build' makes one"):
        given_table(path.with_name("missing"), **SHAPE)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"moe.table: .*table.safetensors"):
        given_table(path, **SHAPE)
