"""Tables in numpy's own files: written, read, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.builders import random_table
from stablemoe_ds.tables.given import given_table
from stablemoe_ds.tables.npz_file import save_npz
from stablemoe_ds.tables.table import RoutingTable
from stablemoe_ds.tables.table_file import read_table

V, K, N = 50, 2, 8
FIT: dict[str, Any] = {"experts": N, "top_k": K, "blocks": (2, 4), "vocab_size": V, "tokenizer": "ab" * 32}


@pytest.fixture
def table() -> RoutingTable:
    return RoutingTable(random_table(V, N, K, 2, seed=1), N, (1, 3), "ab" * 32, {"builder": "random", "seed": 1})


def test_round_trip(table: RoutingTable, tmp_path: Path) -> None:
    save_npz(table, tmp_path / "table")
    with np.load(tmp_path / "table") as file:
        assert np.array_equal(file["expert_LVK"], table.expert_LVK)
        assert (file["blocks"].tolist(), int(file["experts"])) == ([1, 3], N)
    again = read_table(tmp_path / "table")
    assert (again.sha256, again.made, again.tokenizer) == (table.sha256, table.made, table.tokenizer)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int64])
@pytest.mark.parametrize("layers", [None, 2])
def test_one_array_is_enough(table: RoutingTable, tmp_path: Path, dtype: Any, layers: int | None) -> None:
    array = table.expert_LVK if layers else table.expert_LVK[0]
    np.savez(tmp_path / "table.npz", experts_of=array.astype(dtype))
    read = read_table(tmp_path / "table.npz", N)
    assert np.array_equal(read.expert_LVK, table.expert_LVK[: layers or 1])
    assert (read.blocks, read.experts, read.made) == (tuple(range(1, (layers or 1) + 1)), N, {"builder": "npz"})
    fit = {**FIT, "blocks": read.blocks}
    assert given_table(tmp_path / "table.npz", **fit).top_k == K, "it cannot name its tokenizer"


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({}, "is not a routing table"),
        ({"a": np.zeros((3, 1), int), "b": np.zeros(2)}, "it holds a, b"),
        ({"a": np.ones((3, 1))}, r"float64 \[3, 1\]: expected integers"),
        ({"a": np.ones(3, int)}, r"int64 \[3\]: expected integers"),
        ({"a": np.zeros((3, 1), int)}, "all zeros"),
        ({"a": np.array([[1, 1], [0, 1]])}, "id 0 has an expert twice"),
        ({"a": np.array([[1], [-1]])}, "id 1 goes to expert -1"),
        ({"a": np.array([[1], [9]])}, "id 1 goes to expert 9, expected 0 to 7"),
        ({"a": np.array([object()])}, "allow_pickle"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(arrays: dict[str, Any], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "table.npz", **arrays)
    with pytest.raises(UserError, match=said) as caught:
        read_table(tmp_path / "table.npz", N)
    assert len(str(caught.value).splitlines()) == 1


def test_damage_is_noticed_wherever_it_is(table: RoutingTable, tmp_path: Path) -> None:
    save_npz(table, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    for at in range(8, len(good), len(good) // 40):
        bad = bytearray(good)
        bad[at] ^= 0xFF
        (tmp_path / "bad").write_bytes(bad)
        try:
            read = read_table(tmp_path / "bad")
        except UserError:
            continue
        assert (read.sha256, read.tokenizer) == (table.sha256, table.tokenizer), f"byte {at}: a zip has idle bytes"
