from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stablemoe_ds.config.schema import Source
from stablemoe_ds.data import prepare as prepare_module
from stablemoe_ds.data.corpus import PreparedInfo, read_sources
from stablemoe_ds.data.prepare import prepare
from stablemoe_ds.data.text_files import Reading, split_files
from stablemoe_ds.data.tokenizer import Tokenizer, train_tokenizer
from stablemoe_ds.errors import UserError

SOURCE = "def f(x):\n\tif x:\n        return None\n\n"

WIKI = " = First = \n\n text of one \n = = Section = = \n more \n = Second thing = \n\n two \n"


def texts(info: PreparedInfo, tokenizer: Tokenizer) -> list[str]:
    """Documents of a corpus, through megatron-core's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(info.prefix)
    assert data.document_indices.tolist() == list(range(len(data) + 1))
    assert all(data[i][-1] == tokenizer.eos_id for i in range(len(data)))
    return [tokenizer.decode(data[i][:-1]) for i in range(len(data))]


@pytest.mark.parametrize(
    ("documents", "content", "expected"),
    [
        ("file", SOURCE, [SOURCE]),
        ("line", "a\n\n  b \r\n \nc", ["a", "  b ", "c"]),
        ("wiki", WIKI, [WIKI[: WIKI.index(" = Second")], WIKI[WIKI.index(" = Second") :]]),
        ("wiki", "= A =\nx\n== B ==\n= C =\n", ["= A =\nx\n== B ==\n", "= C =\n"]),
        ("wiki", "before\n= A =\n", ["before\n", "= A =\n"]),
        ("line", "\ufeffmark\n", ["mark"]),
    ],
)
def test_documents(tokenizer: Tokenizer, tmp_path: Path, documents: str, content: str, expected: list[str]) -> None:
    (tmp_path / "text").write_bytes(content.encode())
    info = prepare([tmp_path / "text"], tokenizer, tmp_path / "out", documents=documents)  # type: ignore[arg-type]
    assert texts(info, tokenizer) == expected
    assert info.documents == len(expected)


@pytest.mark.parametrize("documents", ["file", "line", "wiki"])
def test_parallel_gives_the_same_bytes(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: str, lines: Callable[..., str]
) -> None:
    files = [tmp_path / name for name in ("b.txt", "a.txt", "c.txt.gz")]
    for number, file in enumerate(files):
        articles = "".join(f"= Title {n} =\n{lines(9, n)}" for n in range(number, 40))
        file.write_bytes(gzip.compress(articles.encode()) if file.suffix == ".gz" else articles.encode())
    prepare(files, tokenizer, tmp_path / "serial", 1, documents)  # type: ignore[arg-type]
    monkeypatch.setattr(prepare_module, "SPAN_BYTES", 500)
    prepare(files, tokenizer, tmp_path / "parallel", 2, documents)  # type: ignore[arg-type]
    for ending in ("bin", "idx", "json", "counts.npy"):
        assert (tmp_path / f"serial.{ending}").read_bytes() == (tmp_path / f"parallel.{ending}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3 + 2 * 4


def test_numbers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "one  two\nthree 中文\n"
    (tmp_path / "text.xz").write_bytes(lzma.compress(text.encode()))
    info = prepare([tmp_path / "text.xz"], tokenizer, tmp_path / "out.v1", documents="file")
    assert (info.documents, info.words, info.characters, info.bytes) == (1, 4, len(text), len(text.encode()))
    assert info == PreparedInfo.read(tmp_path / "out.v1", tokenizer)
    stream = info.stream()
    assert stream.tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    assert info.tokens == len(stream)
    assert stream.dtype == np.uint16
    assert info.token_counts().tolist() == np.bincount(stream, minlength=tokenizer.vocab_size).tolist()


def test_bytes_that_are_no_utf8_are_counted(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "text").write_bytes(b"caf\xe9 \xff\0b \xef\xbf\xbd\nfine\n")
    info = prepare([tmp_path / "text"], tokenizer, tmp_path / "out", reading=Reading(allow_damaged=True))
    assert info.invalid == 2
    assert "2 byte sequences were not UTF-8, 1 were U+FFFD before, 1 control" in caplog.text
    assert texts(info, tokenizer) == ["caf\ufffd \ufffd\0b \ufffd", "fine"]


@pytest.mark.parametrize("content", [b"", b"\n\n \t\n"])
def test_empty_corpus(tokenizer: Tokenizer, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UserError, match="only white space"):
        prepare([tmp_path / "text"], tokenizer, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_failure_leaves_the_old_corpus(tokenizer: Tokenizer, tmp_path: Path, lines: Callable[..., str]) -> None:
    (tmp_path / "good").write_text("one two\n")
    (tmp_path / "bad.gz").write_bytes(gzip.compress(lines(500).encode())[:50])
    old = prepare([tmp_path / "good"], tokenizer, tmp_path / "out")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"cannot read text file .*bad\.gz"):
            prepare([tmp_path / "good", tmp_path / "bad.gz"], tokenizer, tmp_path / "out", workers)
    assert PreparedInfo.read(tmp_path / "out") == old
    assert len(list(tmp_path.iterdir())) == 2 + 4


def test_unwritable_output(tokenizer: Tokenizer, text_file: Path) -> None:
    with pytest.raises(UserError, match="cannot write corpus"):
        prepare([text_file], tokenizer, text_file / "out")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: _cut(Path(f"{p}.bin")), "bin has .* bytes, expected"),
        (lambda p: _cut(Path(f"{p}.idx")), "idx has .* bytes, expected"),
        (lambda p: Path(f"{p}.idx").write_bytes(b"MMID"), "cut short"),
        (lambda p: Path(f"{p}.idx").write_bytes(b"x" * 60), "does not belong"),
        (lambda p: Path(f"{p}.bin").unlink(), "incomplete"),
        (lambda p: Path(f"{p}.json").unlink(), "no prepared corpus"),
        (lambda p: _cut(Path(f"{p}.json")) or _cut(Path(f"{p}.json")), "cannot read corpus description"),
        (lambda p: Path(f"{p}.json").write_text("[]"), "cannot read corpus description"),
        (lambda p: Path(f"{p}.json").write_text(json.dumps({"format": "other"})), "format is not"),
    ],
)
def test_damaged_corpus(
    corpus: Callable[..., str], damage: Callable[[str], object], message: str, request: pytest.FixtureRequest
) -> None:
    prefix = corpus(f"damaged-{abs(hash(request.node.name))}", 5)
    PreparedInfo.read(prefix)
    damage(prefix)
    with pytest.raises(UserError, match=message):
        PreparedInfo.read(prefix)


def test_damaged_counts(corpus: Callable[..., str]) -> None:
    info = PreparedInfo.read(corpus("counts", 5))
    np.save(info.path("counts.npy"), info.token_counts() + 1)
    with pytest.raises(UserError, match="does not belong"):
        info.token_counts()
    info.path("counts.npy").unlink()
    with pytest.raises(UserError, match="token counts"):
        info.token_counts()


def test_another_tokenizer(corpus: Callable[..., str], tokenizer: Tokenizer, text_file: Path, tmp_path: Path) -> None:
    other = train_tokenizer([text_file], tmp_path / "other.model", 330)
    mine = corpus("mine", 5)
    with pytest.raises(UserError, match=f"{tokenizer.fingerprint[:12]}.*{other.fingerprint[:12]}"):
        PreparedInfo.read(mine, other)
    theirs = prepare([text_file], other, tmp_path / "theirs").prefix
    with pytest.raises(UserError, match="different tokenizers"):
        read_sources([Source(path=mine), Source(path=theirs)])
    with pytest.raises(UserError, match="no corpus is named"):
        read_sources([])


def test_split_files(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.txt" for n in range(20)]
    for file in files:
        file.write_text("x" * 100)
    train, held = split_files(files, 0.1, seed=1)
    assert sorted(train + held) == sorted(files)
    assert len(held) == 2
    assert split_files(files[::-1], 0.1, seed=1) == (train, held)
    assert split_files(files, 0.1, seed=2) != (train, held)
    assert len(split_files(files[:2], 0.99, seed=1)[0]) == 1
    for wrong, fraction in ((files[:1], 0.1), (files, 0.0), (files, 1.0)):
        with pytest.raises(UserError, match="cannot hold out"):
            split_files(wrong, fraction, seed=1)
