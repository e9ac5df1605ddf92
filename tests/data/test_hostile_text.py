"""Text of any kind: it comes back as it was, or somebody is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablemoe_ds.data.flaws import Flaws
from stablemoe_ds.data.prepare import prepare
from stablemoe_ds.data.text import Documents, Span, decode, plan_spans, read_documents
from stablemoe_ds.data.text_files import Reading, TextFile
from stablemoe_ds.data.tokenizer import Tokenizer, train_tokenizer
from tests.data.hostile import complaint

TEXTS = {
    "nul": "a\0b\0\0\n\0",
    "right to left": "שלום, עולם! مرحبا بالعالم \u202eabc\u202c \u2067x\u2069",
    "combining": "e\u0301o\u0308\u0323 " + "z" + "\u0301" * 500,
    "surrogate escapes of others": "\ufffd\ue000\uffff\U0010ffff",
    "crlf": "one\r\ntwo\r\n\r\n",
    "lone cr": "one\rtwo\r",
    "line ends of Unicode": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "marks": "\ufeffa\ufeff\u200b\u200d\u00ad",
    "look like pieces": "<s></s><0x0A><unk>▁▁ ▁\t▁\n",
    "one letter": "a" * 5000,
    "spaces": " " * 5000 + "x",
}
ALL_THE_SAME = Reading(allow_damaged=True)
NASTY = "\0\r\n\t \u2028\u2581\ufeff\u0301\u202e\ufffd\U0010ffff<>▁a"


@pytest.fixture(scope="session", params=["unigram", "bpe"])
def either(request: pytest.FixtureRequest, text_file: Path, tokenizer: Tokenizer) -> Tokenizer:
    if request.param == "unigram":
        return tokenizer
    return train_tokenizer([text_file], text_file.with_name("hostile-bpe.model"), 320, "bpe")


@given(text=st.text() | st.text(NASTY))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(either: Tokenizer, text: str) -> None:
    ids = either.encode(text)
    assert either.decode(ids) == text
    assert all(4 <= i < either.vocab_size for i in ids)


@given(text=st.text(st.characters(categories=["Cs"]), min_size=1), before=st.text())
@settings(deadline=None)
def test_halves_of_surrogate_pairs_are_refused(tokenizer: Tokenizer, text: str, before: str) -> None:
    assert complaint(lambda: tokenizer.encode(before + text), f"at character {len(before)}:")


@pytest.mark.parametrize("name", TEXTS)
def test_text_comes_back_from_a_corpus(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"first\n" + TEXTS[name].encode())
    info = prepare([path], tokenizer, tmp_path / "out", documents="file", reading=ALL_THE_SAME)
    *ids, end = info.stream().tolist()
    assert (tokenizer.decode(ids).encode(), end) == (path.read_bytes(), tokenizer.eos_id)
    assert (info.documents, info.invalid) == (1, 0)


def test_ten_megabytes_on_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("one two three route token " * 400_000)
    info = prepare([path], tokenizer, tmp_path / "out", documents="line")
    assert info.documents == 1
    assert tokenizer.decode(info.stream()[:-1].tolist()) == path.read_text()


@given(raw=st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_bytes_become_text_and_what_was_lost_is_counted(raw: bytes) -> None:
    text, invalid = decode(raw)
    assert text == raw.decode(errors="replace")
    assert (invalid == 0) == (text.encode() == raw)


def raw_documents(spans: list[Span], documents: Documents) -> list[bytes]:
    return [document.raw for span in spans for document in read_documents(span, documents, Flaws())]


@given(
    parts=st.lists(
        st.sampled_from([b"a", b"= T =\n", b"\n", b"\r\n", b"\r", b"\0", b"\xff", b" ", "é\u2028".encode()])
    ),
    size=st.integers(1, 20),
)
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("documents", ["line", "wiki"])
def test_documents_do_not_depend_on_how_a_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, documents: Documents, parts: list[bytes], size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_bytes(b"".join(parts))

    def read(size: int) -> list[bytes]:
        return raw_documents(plan_spans([TextFile(path)], documents, size), documents)

    assert read(size) == read(1 << 20)


def test_empty_files_among_others(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for number, text in enumerate(("", "one two", "\n \t\r\n", "three")):
        (tmp_path / f"{number}").write_text(text)
    files = sorted(tmp_path.iterdir())
    info = prepare(files, tokenizer, tmp_path / "out", documents="file")
    assert (info.documents, info.words) == (2, 3)


def grow(path: Path) -> None:
    with path.open("a") as file:
        file.write("more\n" * 1000)


def shrink(path: Path) -> None:
    os.truncate(path, 7)


@pytest.mark.parametrize("documents", ["line", "wiki"])
def test_file_that_grows_is_read_as_far_as_it_was(tmp_path: Path, documents: Documents) -> None:
    path = tmp_path / "text"
    path.write_text("one\ntwo\nthree\n")
    spans = plan_spans([TextFile(path)], documents, 4)
    grow(path)
    assert b"".join(raw_documents(spans, documents)).strip().endswith(b"three")


@pytest.mark.parametrize(
    ("documents", "change"),
    [("line", shrink), ("wiki", shrink), ("line", Path.unlink), ("wiki", Path.unlink), ("file", Path.unlink)],
)
def test_file_that_loses_text_while_it_is_read(
    tmp_path: Path, documents: Documents, change: Callable[[Path], Any]
) -> None:
    path = tmp_path / "some.txt"
    path.write_text("= A =\none\ntwo\nthree\n")
    spans = plan_spans([TextFile(path)], documents, 4)
    change(path)
    assert complaint(lambda: raw_documents(spans, documents), "some.txt")


def test_file_that_vanishes_before_it_is_read(tmp_path: Path) -> None:
    assert complaint(lambda: plan_spans([TextFile(tmp_path / "gone.txt")], "line", 4), "gone.txt")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/null"), os.mkdir])
def test_pipes_and_devices_are_no_text(tokenizer: Tokenizer, tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "some.txt"
    make(path)
    assert complaint(lambda: train_tokenizer([path], tmp_path / "m", 300), "some.txt")
    assert complaint(lambda: prepare([path], tokenizer, tmp_path / "out"), "some.txt")


STRANGE = [b"\0\0\0\n" * 5, "\u3000\n".encode() * 9, "\u0301".encode() * 50, b"\xff" * 500, b"<unk><s></s><0x41>\n" * 5]


@pytest.mark.parametrize("content", [*STRANGE, b"\xef\xbb\xbf", b"\r\r\r a\r", b"a"])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("size", [8, 262, 263, 280])
def test_tokenizer_of_strange_text_works_or_says_why(tmp_path: Path, content: bytes, kind: Any, size: int) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(content)
    if complaint(lambda: train_tokenizer([path], tmp_path / "m", size, kind, reading=ALL_THE_SAME), "") is None:
        learned, text = Tokenizer(tmp_path / "m"), decode(content)[0]
        assert learned.decode(learned.encode(text)) == text


@pytest.mark.parametrize("size", [-5, 0, 3, 2**31, 10**20])
def test_vocabulary_of_no_sensible_size(text_file: Path, tmp_path: Path, size: int) -> None:
    assert complaint(lambda: train_tokenizer([text_file], tmp_path / "m", size), f"vocabulary of {size} cannot")
