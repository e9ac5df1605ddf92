"""The routing table as a file and as a function of scores."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.table import FORMAT, RoutingTable, least_load
from stablemoe_ds.tables.table_file import read_table, writer
from tests.tables.texts import split_at_random


def scores(seed: int = 0, shape: tuple[int, int, int] = (2, 50, 7)) -> np.ndarray:
    """Coarse values, so that ties are common."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


@pytest.fixture
def table() -> RoutingTable:
    return RoutingTable.from_scores(scores(), 2, (3, 9), "abc")


@pytest.mark.parametrize("top_k", [1, 2, 7])
@pytest.mark.parametrize("seed", range(5))
def test_from_scores_takes_the_best_and_the_lowest_of_equals(seed, top_k):
    values = scores(seed)
    table = RoutingTable.from_scores(values, top_k, (1, 2))
    for layer in range(2):
        for token in range(50):
            row = values[layer, token].tolist()
            wanted = sorted(range(7), key=lambda i: (-row[i], i))[:top_k]
            assert table.expert_LVK[layer, token].tolist() == wanted
    assert (table.vocab_size, table.top_k, table.experts) == (50, top_k, 7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    values = scores()
    values[1, 4, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        RoutingTable.from_scores(values, 1, (1, 2))


def test_scores_must_be_float32():
    with pytest.raises(ValueError, match="float64"):
        RoutingTable.from_scores(scores().astype(np.float64), 1, (1, 2))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 5, 1), np.int64), "expected int32"),
        (np.zeros((3, 5, 1), np.int32), r"expected int32 \[2"),
        (np.zeros((2, 5), np.int32), "expected int32"),
        (np.full((2, 5, 1), 4, np.int32), "outside 0..3"),
        (np.full((2, 5, 1), -1, np.int32), "outside 0..3"),
    ],
)
def test_a_wrong_array_is_refused(array, message):
    with pytest.raises(ValueError, match=message):
        RoutingTable(array, 4, (1, 2))


def test_entries_cannot_be_changed(table):
    with pytest.raises(ValueError, match="read-only"):
        table.expert_LVK[0, 0, 0] = 1


def test_file_round_trip(table, tmp_path):
    table.save(tmp_path / "table.safetensors")
    again = RoutingTable.read(tmp_path / "table.safetensors")
    assert np.array_equal(again.expert_LVK, table.expert_LVK)
    assert (again.experts, again.blocks, again.tokenizer) == (7, (3, 9), "abc")
    assert again.sha256 == table.sha256


@pytest.mark.parametrize("form", ["own", "split", "deepseek-v4", "megatron", "npz"])
def test_equal_tables_make_equal_files(form, table, tmp_path):
    """The library writes metadata in the order of a hash map, which is another one each time."""
    one = split_at_random(table, [3], 2) if form == "split" else table
    save = RoutingTable.save if form in ("own", "split") else writer(form)
    for number in range(4):
        save(replace(one, made={"builder": "by hand", "é": number // 9}), tmp_path / str(number))
    assert len({(tmp_path / str(number)).read_bytes() for number in range(4)}) == 1
    assert read_table(tmp_path / "0").sha256 == one.sha256
    if form != "npz":
        (length,) = struct.unpack("<Q", (tmp_path / "0").read_bytes()[:8])
        assert length % 8 == 0, "tensors are aligned"


def test_file_has_the_permissions_of_any_new_file(table, tmp_path):
    path, other = tmp_path / "table.safetensors", tmp_path / "other"
    table.save(path)
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_digest_covers_what_decides_routing(table):
    other = table.expert_LVK.copy()
    other[1, 7] = (other[1, 7] + 1) % 7
    variants = [
        RoutingTable(other, 7, (3, 9)),
        RoutingTable(table.expert_LVK.copy(), 8, (3, 9)),
        RoutingTable(table.expert_LVK.copy(), 7, (3, 8)),
        RoutingTable(table.expert_LVK.reshape(2, 100, 1).copy(), 7, (3, 9)),
        table,
    ]
    assert len({variant.sha256 for variant in variants}) == len(variants)
    assert RoutingTable(table.expert_LVK.copy(), 7, (3, 9), "another tokenizer").sha256 == table.sha256


def test_every_damaged_byte_of_the_entries_is_noticed(table, tmp_path):
    path = tmp_path / "table.safetensors"
    table.save(path)
    good = path.read_bytes()
    entries = table.expert_LVK.nbytes
    for offset in (0, 1, entries // 2, entries - 4):
        position = len(good) - entries + offset
        bad = bytearray(good)
        bad[position] ^= 1
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"damaged|outside"):
            RoutingTable.read(path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_cut_short_is_named(table, tmp_path, keep):
    path = tmp_path / "table.safetensors"
    table.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"table\.safetensors is not a routing table"):
        RoutingTable.read(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a routing table"):
        RoutingTable.read(tmp_path / "none.safetensors")
    array = {"expert_LVK": np.zeros((1, 4, 1), np.int32)}
    save_file(array, str(tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match="is not a routing table"):
        RoutingTable.read(tmp_path / "a.safetensors")
    save_file(array, str(tmp_path / "b.safetensors"), {"format": FORMAT})
    with pytest.raises(UserError, match="is not a routing table"):
        RoutingTable.read(tmp_path / "b.safetensors")


def test_load_is_the_share_of_tokens(table):
    counts = np.random.default_rng(3).integers(0, 100, 50)
    load = table.expert_load(counts)
    for layer in range(2):
        served = [0] * 7
        for token in range(50):
            for expert in table.expert_LVK[layer, token]:
                served[expert] += int(counts[token])
        assert load[layer] == pytest.approx([s * 7 / sum(served) for s in served])
    assert not table.expert_load(np.zeros(50, np.int64)).any()


def test_least_load_is_what_the_commonest_id_forces():
    """ids a, b, c with shares 1/2, 1/4, 1/4: four experts of top-1 cannot do better than 2 times the mean."""
    counts = np.array([200, 100, 100])
    assert least_load(counts, 4, 1) == 2.0
    assert least_load(counts, 4, 2) == 1.0
    assert least_load(counts, 2, 1) == 1.0
    assert least_load(np.zeros(3, np.int64), 4, 1) == 1.0


def test_no_table_of_three_ids_beats_the_least_load():
    counts = np.array([7, 2, 1])
    loads = []
    for code in range(4**3):
        entries = np.array([code % 4, code // 4 % 4, code // 16], np.int32).reshape(1, 3, 1)
        loads.append(RoutingTable(entries, 4, (1,)).expert_load(counts).max())
    assert min(loads) == pytest.approx(least_load(counts, 4, 1))


MADE = {"builder": "cooccurrence", "options": {"dims": 64}, "seed": 3, "corpus": "abc"}


def test_a_file_says_how_the_table_was_made(table, tmp_path):
    path = tmp_path / "table.safetensors"
    described = replace(table, made=MADE)
    described.save(path)
    assert RoutingTable.read(path).made == MADE
    assert RoutingTable.read(path).sha256 == described.sha256 == table.sha256, "routing is decided by the entries alone"


def test_a_file_that_does_not_say_how_it_was_made_is_read(table, tmp_path):
    """As written before tables said so."""
    path = tmp_path / "old.safetensors"
    metadata = {"format": FORMAT, "experts": "7", "blocks": "3,9", "tokenizer": "abc", "sha256": table.sha256}
    save_file({"expert_LVK": table.expert_LVK.copy()}, str(path), metadata)
    old = RoutingTable.read(path)
    assert (old.made, old.sha256) == ({}, table.sha256)


@pytest.mark.parametrize("made", ["{", "7", '"text"', "[1]"])
def test_a_damaged_story_is_refused(table, tmp_path, made):
    path = tmp_path / "bad.safetensors"
    metadata = {"format": FORMAT, "experts": "7", "blocks": "3,9", "tokenizer": "", "sha256": table.sha256}
    save_file({"expert_LVK": table.expert_LVK.copy()}, str(path), metadata | {"made": made})
    with pytest.raises(UserError, match="is not a routing table that can be read"):
        RoutingTable.read(path)
