"""Ids with several rows in a table: rows looked up one by one, the file, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stablemoe_ds.api.plain_layer import MoELayer
from stablemoe_ds.errors import UserError
from stablemoe_ds.tables import split_ids
from stablemoe_ds.tables.builders import random_table
from stablemoe_ds.tables.derived import rebalanced_table
from stablemoe_ds.tables.measures import difference, measure
from stablemoe_ds.tables.resize import resized_table
from stablemoe_ds.tables.split_ids import SplitIds
from stablemoe_ds.tables.table import FORMAT, RoutingTable
from stablemoe_ds.tables.table_file import writer
from tests.tables.texts import corpus_of, random_stream, slow_experts, split_at_random

VOCAB, EXPERTS, HOT = 30, 6, [2, 5, 29]
PLAIN = RoutingTable(random_table(VOCAB, EXPERTS, 2, 2, seed=1), EXPERTS, (1, 4), "tokenizer")
SPLIT = split_at_random(PLAIN, HOT, 3)
TEXT = corpus_of(random_stream(3, VOCAB, 700), VOCAB)


def counted_slowly(table: RoutingTable, layer: int) -> list[float]:
    """Tokens of the text by expert, one by one, as multiples of the mean."""
    served = np.zeros(EXPERTS)
    for experts in slow_experts(table, TEXT.streams[0].ids.tolist())[layer]:
        served[experts] += 1
    return (served / served.mean()).tolist()


def test_rows_are_those_of_looking_up_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (SPLIT.vocab_size, SPLIT.top_k, SPLIT.expert_LVK.shape[1]) == (VOCAB, 2, VOCAB + 9)
    ids = TEXT.streams[0].ids
    sequences = ids[:60].reshape(5, 12)
    for rows, sequence in zip(SPLIT.rows(sequences), sequences.tolist(), strict=True):
        assert SPLIT.expert_LVK[:, rows].tolist() == slow_experts(SPLIT, sequence)
    assert np.array_equal(PLAIN.rows(sequences), sequences)
    monkeypatch.setattr(split_ids, "PIECE", 7)
    assert SPLIT.split is not None
    pieces = list(SPLIT.split.rows_in_pieces(ids, 3, 45))
    assert len(pieces) == 6
    assert np.array_equal(np.concatenate(pieces), SPLIT.rows(ids)[3:45])


def test_load_and_counts_are_those_of_every_token() -> None:
    counts = TEXT.row_counts(SPLIT.split)
    assert counts.sum() == TEXT.token_counts.sum()
    for layer, load_N in enumerate(SPLIT.expert_load(counts)):
        assert load_N.tolist() == pytest.approx(counted_slowly(SPLIT, layer))
    assert measure(SPLIT, TEXT)[1].max_load == pytest.approx(max(counted_slowly(SPLIT, 1)))


def test_counts_of_ids_are_divided_as_in_the_text_that_it_was_split_by() -> None:
    estimated = SPLIT.counts_of_rows(np.full(VOCAB, 1000))
    assert estimated.sum() == 1000 * VOCAB
    assert set(estimated[VOCAB:]) == {200}
    assert estimated[HOT].tolist() == [400] * 3
    of_ids = np.bincount(SPLIT.id_of_row, weights=estimated)
    assert of_ids.tolist() == [1000] * VOCAB


def test_rows_with_the_experts_of_their_id_change_nothing() -> None:
    assert SPLIT.split is not None
    same = PLAIN.with_rows_of(SPLIT.split)
    ids = TEXT.streams[0].ids
    assert np.array_equal(same.expert_LVK[:, same.rows(ids)], PLAIN.expert_LVK[:, ids])
    assert [layer.cohesion for layer in measure(same, TEXT)] == pytest.approx(
        [layer.cohesion for layer in measure(PLAIN, TEXT)]
    )
    assert [(d.ids_moved, d.tokens_moved) for d in difference(PLAIN, same, TEXT)] == [
        (pytest.approx(0, abs=1e-12), 0)
    ] * 2
    moved = difference(PLAIN, SPLIT, TEXT)
    assert all(0 < layer.ids_moved < len(HOT) / VOCAB for layer in moved)
    assert all(0 < (layer.tokens_moved or 0) < 1 for layer in moved)


def test_layers_of_a_split_table_and_of_a_plain_one_in_one_table() -> None:
    other = replace(PLAIN, blocks=(2, 3), expert_LVK=(PLAIN.expert_LVK + 1) % np.int32(EXPERTS))
    ids = TEXT.streams[0].ids.tolist()
    for joined in (SPLIT.joined_to(other), other.joined_to(SPLIT)):
        assert joined.blocks == (1, 2, 3, 4)
        first, second, third, fourth = slow_experts(joined, ids)
        assert [first, fourth] == slow_experts(SPLIT, ids)
        assert [second, third] == slow_experts(other, ids)
        assert joined.only((1, 4)).sha256 == SPLIT.sha256


def test_a_table_with_its_rows_resized_and_balanced() -> None:
    for experts in (4, 10):
        resized = resized_table(SPLIT, TEXT, experts, max_load=1.2)
        assert resized.split is SPLIT.split
        assert (np.diff(np.sort(resized.expert_LVK, axis=-1), axis=-1) > 0).all()
        assert max(layer.max_load for layer in measure(resized, TEXT)) < 1.21
    balanced = rebalanced_table(SPLIT, TEXT, 1.05)
    assert max(layer.max_load for layer in measure(balanced, TEXT)) < 1.06
    assert max(layer.max_load for layer in measure(SPLIT, TEXT)) > 1.06


def test_file_round_trip_and_format(tmp_path: Path) -> None:
    SPLIT.save(tmp_path / "split")
    again = RoutingTable.read(tmp_path / "split")
    assert again.sha256 == SPLIT.sha256
    for name, array in SPLIT.split_arrays().items():
        assert np.array_equal(again.split_arrays()[name], array)
    assert b'"format":"stablemoe-routing-table-2"' in (tmp_path / "split").read_bytes()[:4096]
    PLAIN.save(tmp_path / "plain")
    assert f'"format":"{FORMAT}"'.encode() in (tmp_path / "plain").read_bytes()[:4096], "readable by older versions"


@pytest.mark.parametrize("name", ["split_ids_J", "split_row_JV", "split_share_Q", "expert_LVK"])
def test_a_changed_or_missing_part_is_damage(name: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "table"
    SPLIT.save(path)
    with safe_open(str(path), "numpy") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if name != "expert_LVK":
        save_file({key: array for key, array in tensors.items() if key != name}, path, metadata)
        with pytest.raises(UserError, match="not a routing table that can be read"):
            RoutingTable.read(path)
    tensors[name].reshape(-1)[-1] -= 1
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=r"is damaged: its sha256|can be read"):
        RoutingTable.read(path)


@pytest.mark.parametrize(
    ("ids", "rows", "share", "message"),
    [
        ([1, 1], [[1, 4, 1], [1, 1, 5]], [0, 0], "ascending"),
        ([1], [[1, 3, 1], [1, 1, 1]], [0], "a line of rows"),
        ([3], [[3, 3, 3]], [0], r"no id has row 3|outside 0\.\.2"),
        ([1], [[1, 0, 3]], [0], "id 1 has a row that does not exist"),
        ([1], [[1, 1, 5]], [0], "id 1 has a row that does not exist"),
        ([1, 2], [[1, 1, 3], [2, 2, 3]], [0], "or that another id has"),
        ([1], [[1, 1, 3]], [0, 0], "no id has row 4"),
        ([1], [[1, 1, 3]], [1_000_001], "more than all"),
    ],
)
def test_rows_that_contradict_each_other(ids: list[int], rows: list[list[int]], share: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitIds(*(np.array(part, np.int32) for part in (ids, rows, share)))
    with pytest.raises(ValueError, match="expected int32"):
        SplitIds(*(np.array(part) for part in (ids, rows, share)))


@pytest.mark.parametrize("form", ["deepseek-v4", "megatron", "npz"])
def test_formats_that_look_an_id_up_by_itself(form: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"splits 3 ids by the id before them, for which {form} has no place"):
        writer(form)(SPLIT, tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_a_layer_alone_looks_at_no_id_before() -> None:
    layer = MoELayer(8, ffn_hidden_size=16, router="hash", vocab_size=VOCAB, experts=EXPERTS, top_k=2)
    with pytest.raises(UserError, match="splits 3 ids by the id before them"):
        layer.follow(SPLIT)
