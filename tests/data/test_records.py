"""JSON lines and Parquet: a record is a document."""

from __future__ import annotations

import builtins
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablemoe_ds.data import prepare as prepare_module
from stablemoe_ds.data.flaws import Flaws
from stablemoe_ds.data.prepare import prepare
from stablemoe_ds.data.text import plan_spans, read_documents
from stablemoe_ds.data.text_files import Reading, recognise
from stablemoe_ds.data.tokenizer import Tokenizer, train_tokenizer
from stablemoe_ds.errors import UserError
from tests.data.hostile import CUTS, FLIPS, Damage, complaint

TEXTS = [f"record {n}\n= A title =\nwith été, 中文 and \U0001f600; {n * n} words  " for n in range(300)]


def as_jsonl(texts: list[str], **options: Any) -> bytes:
    return "".join(json.dumps({"id": n, "text": text}, **options) + "\n" for n, text in enumerate(texts)).encode()


def as_parquet(path: Path, texts: Any = TEXTS, rows: int = 23, **options: Any) -> Path:
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=rows, **options)
    return path


def documents(path: Path, size: int = 900, reading: Reading | None = None) -> list[str]:
    spans = plan_spans(recognise([path], reading or Reading()), "file", size)
    return [document.text for span in spans for document in read_documents(span, "file", Flaws())]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "some.jsonl"
    path.write_bytes(as_jsonl(TEXTS))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "raw", "crlf", "bom", "gz", "parquet", "zstd", "blank lines"])
def test_records_are_documents_however_they_are_written(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    path = tmp_path / "records.txt"
    lines = as_jsonl(TEXTS)
    path.write_bytes(
        {
            "raw": as_jsonl(TEXTS, ensure_ascii=False),
            "crlf": lines.replace(b"\n", b"\r\n"),
            "bom": b"\xef\xbb\xbf" + lines,
            "gz": gzip.compress(lines),
            "blank lines": b"\n \n" + lines.replace(b"\n", b"\n\n"),
        }.get(kind, lines)
    )
    if kind in ("parquet", "zstd"):
        as_parquet(path, compression="zstd" if kind == "zstd" else "snappy")
    assert documents(path) == TEXTS
    info = prepare([path], tokenizer, tmp_path / "out", documents="wiki")
    assert (info.documents, info.words) == (len(TEXTS), sum(len(text.split()) for text in TEXTS))
    assert (info.characters, info.bytes) == (len("".join(TEXTS)), len("".join(TEXTS).encode()))
    ids = [i for text in TEXTS for i in (*tokenizer.encode(text), tokenizer.eos_id)]
    assert info.stream().tolist() == ids


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_workers_and_spans_change_nothing(
    jsonl: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    path = jsonl if ending == "jsonl" else as_parquet(jsonl.with_suffix(".parquet"))
    for workers, size in ((1, 1 << 22), (1, 900), (2, 500)):
        monkeypatch.setattr(prepare_module, "SPAN_BYTES", size)
        prepare([path, jsonl], tokenizer, path.with_name(f"{workers}-{size}"), workers)
    assert len(plan_spans(recognise([path], Reading()), "line", 500)) > 9, "the file is shared out"
    for ending in ("bin", "idx", "json", "counts.npy"):
        one, *others = (file.read_bytes() for file in path.parent.glob(f"*-*.{ending}"))
        assert others == [one, one]


def test_tokenizer_learns_from_the_text_alone(jsonl: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(TEXTS))
    parquet = as_parquet(tmp_path / "some.parquet")
    made = [train_tokenizer([path], tmp_path / path.stem, 330) for path in (plain, jsonl, parquet)]
    assert len({one.fingerprint for one in made}) == 1


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_field(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"some.{ending}"
    rows = [{"text": "not this", "body": f"body {n}"} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert documents(path, reading=Reading(field="body")) == [row["body"] for row in rows]
    assert "'body'" in (complaint(lambda: _prepare_strictly(path, Reading(field="none")), path.name) or "")


def _prepare_strictly(path: Path, reading: Reading | None = None, workers: int = 1) -> Any:
    """Up to the verdict; the tokenizer does not matter for it."""
    from stablemoe_ds.data.flaws import Judge

    for file in recognise([path], reading or Reading()):
        flaws = Flaws()
        for span in plan_spans([file], "file", 900):
            part = Flaws()
            list(read_documents(span, "file", part))
            flaws.add(part)
        Judge(False).file(file, flaws)


BROKEN = {
    "cut": (b'{"text": "cut', "is not JSON"),
    "no object": (b"[1, 2]", "is an array, expected an object"),
    "plain": (b"plain text", "is not JSON"),
    "no field": (b'{"content": "a", "id": 7}', "has no field 'text' (its fields: 'content', 'id'"),
    "number": (b'{"text": 5}', "has a number in field 'text', expected a string"),
    "null": (b'{"text": null}', "has null in field 'text'"),
    "texts": (b'{"text": ["a", "b"]}', "has an array in field 'text'"),
    "two": (b'{"text": "a"} {"text": "b"}', "is not JSON"),
    "deep": (b'{"text": ' + b"[" * 100_000, "is nested too deeply"),
    "huge number": (b'{"id": ' + b"9" * 9000 + b', "text": "a"}', "is not JSON"),
    "NUL": (bytes(20), "is not JSON"),
    "strange key": (b'{"\xff\\ud800\\n": 1}', "has no field 'text'"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("packed", [False, True])
def test_broken_lines_are_counted_and_the_first_is_shown(tmp_path: Path, name: str, packed: bool) -> None:
    line, reason = BROKEN[name]
    path = tmp_path / "some.jsonl"
    content = as_jsonl(TEXTS[:200]) + b"\n" + line + b"\n" + as_jsonl(TEXTS[200:]) + line
    path.write_bytes(gzip.compress(content) if packed else content)
    found = complaint(lambda: _prepare_strictly(path), "some.jsonl") or ""
    assert f"2 of 302 records have no text, first line 202, which {reason}" in found


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_records_are_left_out_by_request(
    jsonl: Path, tokenizer: Tokenizer, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    jsonl.write_bytes(b'{"other": 1}\n' + jsonl.read_bytes() + b'{"text": "cut')
    parquet = as_parquet(jsonl.with_suffix(".parquet"), [None, *TEXTS])
    for path, broken, place in ((jsonl, 2, "line 1,"), (parquet, 1, "row 1,")):
        with pytest.raises(UserError, match=f"{path.name}: .* first {place}"):
            prepare([path], tokenizer, path.with_name("out"), workers)
        info = prepare([path], tokenizer, path.with_name("out"), workers, reading=Reading(allow_damaged=True))
        assert info.documents == len(TEXTS)
        assert f"{broken} of {len(TEXTS) + broken} records have no text: left out" in caplog.text


def test_halves_of_surrogate_pairs_become_a_sign_each(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(as_jsonl(TEXTS) + b'{"text": "a\\ud83d b\\ude00 \\ud83d\\ude00 \xff"}\n')
    assert documents(path)[-1] == "a\ufffd b\ufffd \U0001f600 \ufffd"
    assert prepare([path], tokenizer, tmp_path / "out").invalid == 3


def test_blank_texts_are_no_documents_and_no_fault(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(as_jsonl(["", "one", " \n\t", "two"]))
    assert documents(path) == documents(as_parquet(tmp_path / "p", ["", "one", " \n\t", "two"])) == ["one", "two"]
    assert prepare([path], tokenizer, tmp_path / "out").documents == 2


def test_first_record_longer_than_what_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    texts = ["long " * 50_000, "short"]
    path.write_bytes(as_jsonl(texts))
    assert documents(path) == texts


@pytest.mark.parametrize(
    ("content", "said"), [(b"no JSON at all\n", "line 1, which is not JSON"), (b"", None), (b"\n", None)]
)
def test_the_name_decides_where_the_bytes_do_not(tmp_path: Path, content: bytes, said: str | None) -> None:
    path = tmp_path / "some.ndjson"
    path.write_bytes(content)
    found = complaint(lambda: _prepare_strictly(path), "some.ndjson")
    assert (found is None and said is None) or (said or "-") in (found or "")
    path = path.rename(tmp_path / "some.txt")
    assert documents(path, reading=Reading(format="text")) == ([content.decode()] if content.strip() else [])


@pytest.mark.parametrize(
    "texts",
    [
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array([text.encode() for text in TEXTS]),
        pa.array(TEXTS, pa.string_view()),
    ],
    ids=lambda texts: str(texts.type)[:12],
)
def test_every_type_of_text_in_parquet(tmp_path: Path, texts: Any) -> None:
    assert documents(as_parquet(tmp_path / "some.parquet", texts)) == TEXTS


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"text": [1, 2]}, "its column 'text' is int64"),
        ({"text": [["a"], ["b"]]}, "is list<"),
        ({"body": ["a"], "title": ["b"], "n": [1]}, "'body', 'title'"),
        ({"data": [{"text": "a"}]}, "columns of text are none"),
    ],
)
def test_parquet_without_a_column_of_text(tmp_path: Path, table: dict[str, Any], said: str) -> None:
    path = tmp_path / "some.parquet"
    pq.write_table(pa.table(table), path)
    assert said in (complaint(lambda: documents(path), "some.parquet") or "")


def test_bytes_that_only_call_themselves_a_string(tmp_path: Path, tokenizer: Tokenizer) -> None:
    raw = pa.array([b"caf\xe9 cr\xe8me", b"fine"])
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    path = as_parquet(tmp_path / "some.parquet", text)
    assert documents(path) == ["caf\ufffd cr\ufffdme", "fine"]
    assert complaint(lambda: prepare([path], tokenizer, tmp_path / "out"), "some.parquet is not UTF-8")


@given(damage=CUTS | FLIPS)
@settings(max_examples=100, deadline=None)
def test_damaged_parquet_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, damage: Damage) -> None:
    """It has no checksums, so a changed letter is a letter; but nothing crashes and every complaint names the file."""
    path = as_parquet(tmp_path_factory.getbasetemp() / "damaged.parquet", TEXTS[:60])
    path.write_bytes(damage(path.read_bytes()))
    complaint(lambda: documents(path), "damaged.parquet")


@given(lines=st.lists(st.sampled_from([b'{"text": "a"}', b'{"text": "\xc3\xa9"}', b"", b"x", b"\xff", b"\0"])))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_any_cut_of_json_lines_finds_the_same(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(end.join(lines))

    def read(size: int) -> tuple[list[bytes], Flaws]:
        total, raw = Flaws(), []
        for span in plan_spans(recognise([path], Reading(format="jsonl")), "file", size):
            part = Flaws()
            raw += [document.raw for document in read_documents(span, "file", part)]
            total.add(part)
        return raw, total

    assert read(3) == read(1 << 20)


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_parquet(tmp_path / "some.parquet")
    real: Callable[..., Any] = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    found = complaint(lambda: documents(path), "some.parquet")
    monkeypatch.undo()
    assert "pip install 'stablemoe_ds[parquet]'" in (found or "")


def test_ids_are_counted_as_in_any_corpus(jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    info = prepare([jsonl], tokenizer, tmp_path / "out")
    counts = np.bincount(info.stream(), minlength=tokenizer.vocab_size)
    assert info.token_counts().tolist() == counts.tolist()
