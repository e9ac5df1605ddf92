"""Prepared files that are damaged: a complaint on one line that names the file, or the very same data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from torch import distributed

from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.corpus import PreparedInfo
from stablemoe_ds.data.dataset import EvalDataset
from stablemoe_ds.data.tokenizer import Tokenizer, train_tokenizer
from stablemoe_ds.data.verified import verify_once
from stablemoe_ds.tables.table import RoutingTable
from tests.data.hostile import DAMAGES, STRANGE, Damage, complaint, refused_when_damaged
from tests.distributed.launch import run_distributed
from tests.tables.texts import split_at_random

ENDINGS = ("json", "idx", "bin", "counts.npy")
MANY = settings(max_examples=150, deadline=None)


@pytest.fixture(scope="session")
def small(corpus: Callable[..., str]) -> PreparedInfo:
    """Five documents. What a test does to its files, it undoes."""
    return PreparedInfo.read(corpus("hostile", 5))


@pytest.fixture
def copy(small: PreparedInfo, tmp_path: Path) -> PreparedInfo:
    """The same, to be spoiled."""
    for ending in ENDINGS:
        (tmp_path / f"copy.{ending}").write_bytes(small.path(ending).read_bytes())
    return replace(small, prefix=str(tmp_path / "copy"))


def everything(prefix: str) -> tuple[PreparedInfo, list[int], bytes, bytes]:
    """All that is ever read of a corpus."""
    info = PreparedInfo.read(prefix)
    info.verify()
    return info, info.token_counts().tolist(), info.stream().tobytes(), info.path("idx").read_bytes()


@pytest.mark.parametrize("ending", ENDINGS)
def test_corpus_cut_short_at_any_byte(small: PreparedInfo, ending: str) -> None:
    path, wanted = small.path(ending), everything(small.prefix)
    good = path.read_bytes()
    taken = []
    for length in [*range(min(len(good), 600)), *range(600, len(good), 29)]:
        path.write_bytes(good[:length])
        if complaint(lambda: everything(small.prefix), path.name) is None:
            taken.append(everything(small.prefix))
    path.write_bytes(good)
    assert taken in ([], [wanted]), "only the newline at the end of the description may be missing"


@pytest.mark.parametrize("ending", ENDINGS)
@given(damage=DAMAGES)
@MANY
def test_damaged_corpus_is_never_wrong_data(small: PreparedInfo, ending: str, damage: Damage) -> None:
    path, wanted = small.path(ending), everything(small.prefix)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    try:
        if complaint(lambda: everything(small.prefix), path.name) is None:
            assert everything(small.prefix) == wanted
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("spoil", STRANGE)
def test_corpus_that_is_no_file(copy: PreparedInfo, ending: str, spoil: Callable[[Path], None]) -> None:
    spoil(copy.path(ending))
    assert complaint(lambda: everything(copy.prefix), f"copy.{ending}")


@pytest.mark.parametrize("kind", ["length", "place", "document"])
@pytest.mark.parametrize("number", [0, 2, -1])
@pytest.mark.parametrize("add", [-(10**6), -1, 1, 10**6])
def test_index_that_points_elsewhere(copy: PreparedInfo, kind: str, number: int, add: int) -> None:
    """Lengths below zero, places outside of the .bin, documents that begin at no sequence."""
    n = copy.documents
    content = bytearray(copy.path("idx").read_bytes())
    dtype, start, count = {
        "length": ("<i4", 34, n),
        "place": ("<i8", 34 + 4 * n, n),
        "document": ("<i8", 34 + 12 * n, n + 1),
    }[kind]
    np.frombuffer(content, dtype, count, start)[number] += add
    copy.path("idx").write_bytes(content)
    assert complaint(lambda: PreparedInfo.read(copy.prefix), "copy.idx")


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": "7"},
        {"tokens": True},
        {"tokens": 46.0},
        {"documents": -5},
        {"documents": 0},
        {"words": None},
        {"vocab_size": 10**30},
        {"dtype": "object"},
        {"dtype": "float16"},
        {"dtype": ["uint16"]},
        {"sha256": 1},
        {"prefix": "elsewhere"},
        {"more": 1},
        {"seal": "x"},
    ],
    ids=str,
)
def test_description_that_cannot_be(copy: PreparedInfo, change: dict[str, Any]) -> None:
    path = copy.path("json")
    fields = json.loads(path.read_text())
    del fields["seal"]
    path.write_text(json.dumps(fields))
    everything(copy.prefix)  # a description written by hand needs no seal
    path.write_text(json.dumps({**fields, **change}))
    assert complaint(lambda: everything(copy.prefix), "copy.")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' * 50_000, "9" * 10_000, "NaN", "null", "\0", "\ufeff{}"])
def test_description_that_is_no_json_object(copy: PreparedInfo, text: str) -> None:
    copy.path("json").write_text(text)
    assert complaint(lambda: PreparedInfo.read(copy.prefix), "copy.json")


def test_ids_beyond_the_vocabulary(copy: PreparedInfo) -> None:
    """In a corpus that is otherwise as it says: a model would look them up past the end of its embedding."""
    ids = copy.stream().copy()
    ids[7] = copy.vocab_size
    ids.tofile(copy.path("bin"))
    replace(copy, sha256=hashlib.sha256(ids.tobytes()).hexdigest()).save(copy.path("json"))
    source = [Source(path=copy.prefix)]
    folder = copy.path("bin").parent / "cache"
    for read in (
        lambda: EvalDataset(source, 8),
        lambda: EvalDataset(source, 8, max_tokens=7),
        lambda: verify_once([copy], folder),
    ):
        assert "ids outside 0..349" in (complaint(read, "copy.bin") or "")
    assert EvalDataset(source, 8, max_tokens=6).tokens == 6, "what is not read does no harm"


def flip_one_id(info: PreparedInfo) -> None:
    """A second after it was written: the clocks of file systems are coarse."""
    ids, path = info.stream().copy(), info.path("bin")
    ids[9] ^= 1
    then = path.stat().st_mtime_ns
    ids.tofile(path)
    os.utime(path, ns=(then, then + 10**9))


def test_changed_ids_are_noticed_before_they_are_used(copy: PreparedInfo, tmp_path: Path) -> None:
    verify_once([copy], tmp_path)
    flip_one_id(copy)
    assert complaint(lambda: verify_once([copy], tmp_path), "copy.bin")
    assert complaint(lambda: EvalDataset([Source(path=copy.prefix)], 8), "copy.bin")


def test_corpus_is_read_through_once(copy: PreparedInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(PreparedInfo, "verify", lambda info: reads.append(info.prefix))
    for _ in range(3):
        verify_once([copy], tmp_path)
    assert reads == [copy.prefix]
    os.utime(copy.path("bin"), (0, 0))
    verify_once([copy], tmp_path)
    assert len(reads) == 2, "a file that was touched may be another"


def test_unwritable_cache(copy: PreparedInfo) -> None:
    assert complaint(lambda: verify_once([copy], copy.path("bin") / "cache"), "copy.bin/cache")


def told_by_rank(prefix: str, folder: Path) -> str:
    distributed.init_process_group("gloo")
    try:
        return complaint(lambda: verify_once([PreparedInfo.read(prefix)], folder), "copy.bin") or ""
    finally:
        distributed.destroy_process_group()


@pytest.mark.distributed
def test_every_rank_is_told_what_the_first_one_found(copy: PreparedInfo, tmp_path: Path) -> None:
    flip_one_id(copy)
    first, second = run_distributed(2, told_by_rank, copy.prefix, tmp_path)
    assert first == second != ""


def verify_here(prefixes: list[str], folder: Path) -> str:
    distributed.init_process_group("gloo")
    try:
        info = PreparedInfo.read(prefixes[distributed.get_rank()])
        return complaint(lambda: verify_once([info], folder), info.prefix) or ""
    finally:
        distributed.destroy_process_group()


@pytest.mark.distributed
def test_hosts_with_different_corpora(corpus: Callable[..., str], tmp_path: Path) -> None:
    prefixes = [corpus("one host"), corpus("another host", 100)]
    said = run_distributed(2, verify_here, prefixes, tmp_path)
    assert all("rank 1 has another text at" in line for line in said)


@pytest.fixture(scope="session", params=["whole ids", "split ids"])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RoutingTable]:
    path = tmp_path_factory.mktemp("table") / "table.safetensors"
    table = RoutingTable(np.arange(60, dtype=np.int32).reshape(2, 15, 2) % 7, 7, (3, 9), "f" * 64)
    if request.param == "split ids":
        table = split_at_random(table, [2, 3, 14], 2)
    table.save(path)
    return path, table


@given(damage=DAMAGES)
@MANY
def test_damaged_table_never_routes_otherwise(table: tuple[Path, RoutingTable], damage: Damage) -> None:
    path, wanted = table
    good = path.read_bytes()
    path.write_bytes(damage(good))
    try:
        if complaint(lambda: RoutingTable.read(path), path.name) is None:
            assert RoutingTable.read(path).sha256 == wanted.sha256
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("spoil", STRANGE)
def test_table_that_is_no_file(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "some.table"
    path.touch()
    spoil(path)
    assert complaint(lambda: RoutingTable.read(path), "some.table")


@pytest.mark.parametrize("spoil", STRANGE)
def test_tokenizer_that_is_no_file(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "some.model"
    path.touch()
    spoil(path)
    assert complaint(lambda: Tokenizer(path), "some.model")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_damaged_tokenizer_neither_crashes_nor_fails_later(text_file: Path, tmp_path: Path, kind: Any) -> None:
    good = train_tokenizer([text_file], tmp_path / "good.model", 320, kind).path
    assert 200 < refused_when_damaged(good, cut_every=2) < 400
