from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from stablemoe_ds.data.text_files import Reading
from stablemoe_ds.data.tokenizer import Tokenizer, train_tokenizer
from stablemoe_ds.errors import UserError

SOURCE = "def area(width, height):\n\t# a tab\n\tif width < 0:\n        return None\n    return width * height\n\n\n"

TEXTS = {
    "source": SOURCE,
    "newlines": "\n\n a\n\r\n\tb\n \n",
    "spaces": "  two  leading,   runs and trailing  ",
    "emoji": "a 😀 and 👩‍👩‍👧 b",
    "chinese": "路由 稳定，混合专家。",
    "nul": "a\0b",
    "space sign": "▁ bars ▁▂▃▁",
    "special pieces": "<pad></s><unk><0x41>",
    "separators": "a\u2028b\u00a0c\ufeff\x0b\x0c",
    "empty": "",
}


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def either(request: pytest.FixtureRequest, text_file: Path, tokenizer: Tokenizer) -> Tokenizer:
    if request.param == "unigram":
        return tokenizer
    return train_tokenizer([text_file], text_file.with_name("bpe.model"), 320, "bpe")


@pytest.mark.parametrize("name", TEXTS)
def test_text_comes_back(either: Tokenizer, name: str) -> None:
    ids = either.encode(TEXTS[name])
    assert either.decode(ids) == TEXTS[name]
    assert all(4 <= i < either.vocab_size for i in ids)


def test_ids_of_a_whole_are_ids_of_its_lines(either: Tokenizer) -> None:
    assert either.encode(SOURCE) == [i for line in SOURCE.splitlines(keepends=True) for i in either.encode(line)]


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 3)
    hello = tokenizer.encode("one two")
    assert tokenizer.decode([1, *hello, tokenizer.eos_id, tokenizer.pad_id]) == "one two"
    newline, tab = tokenizer.encode("\n\t")
    assert (tokenizer.piece(newline), tokenizer.piece(tab)) == ("\\n", "\\t")
    assert "".join(tokenizer.piece(i) for i in hello) == "one▁two"


def test_learns_words(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(SOURCE)) < 0.6 * len(SOURCE)


def test_largest_vocabulary_is_named_and_works(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("hello world\nfoo bar\n" * 3)
    with pytest.raises(UserError, match=r"vocabulary of 5000 .* largest that works is \d+") as caught:
        train_tokenizer([text], tmp_path / "m.model", 5000)
    assert list(tmp_path.iterdir()) == [text]
    largest = int(str(caught.value).rsplit(" ", 1)[1])
    assert train_tokenizer([text], tmp_path / "m.model", largest).vocab_size == largest


def test_smallest_vocabulary_is_named_and_works(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"smallest that works is \d+") as caught:
        train_tokenizer([text_file], tmp_path / "m.model", 20)
    smallest = int(str(caught.value).rsplit(" ", 1)[1])
    assert train_tokenizer([text_file], tmp_path / "m.model", smallest).vocab_size == smallest


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
def test_text_without_words(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UserError, match="no text to learn"):
        train_tokenizer([tmp_path / "text"], tmp_path / "m.model", 300)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"hello\n" * 1000)[:30])
    for files, message in (
        ([], "no text file"),
        ([tmp_path / "none.txt"], "none.txt does not exist"),
        ([tmp_path], "is a directory"),
        ([tmp_path / "broken.gz"], "cannot read text file .*broken.gz"),
    ):
        with pytest.raises(UserError, match=message):
            train_tokenizer(files, tmp_path / "m.model", 300)


def test_long_line_is_learned_from(tmp_path: Path) -> None:
    """The trainer drops long lines: a text that is one line must not count as none."""
    text = tmp_path / "text"
    text.write_text("hello wonderful world " * 50_000)
    assert len(train_tokenizer([text], tmp_path / "m.model", 285).encode("wonderful")) < 9


def test_bytes_that_are_no_utf8(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"caf\xe9 and \xff\0 rest\n" * 5)
    model = train_tokenizer([text], tmp_path / "m.model", 273, reading=Reading(allow_damaged=True))
    assert "10 byte sequences were not UTF-8" in caplog.text
    assert model.decode(model.encode("rest")) == "rest"


def test_large_text_is_sampled_evenly(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("".join(f"{'abc' if n % 2 == 0 else 'xyz'} line\n" for n in range(200)))
    model = train_tokenizer([text], tmp_path / "m.model", 270, sample_bytes=text.stat().st_size // 2)
    pieces = {model.piece(i) for i in range(model.vocab_size)}
    assert "a" in pieces
    assert "x" not in pieces


@pytest.mark.parametrize("content", [b"", b"garbage", None, "half"])
def test_damaged_model(tokenizer: Tokenizer, tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "m.model"
    if content is not None:
        whole = tokenizer.path.read_bytes()
        path.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"m\.model"):
        Tokenizer(path)


def test_half_a_surrogate_pair(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="character 3"):
        tokenizer.encode("abc\ud800")


def test_unwritable_output(text_file: Path) -> None:
    with pytest.raises(UserError, match="cannot write tokenizer"):
        train_tokenizer([text_file], text_file / "m.model", 300)


def test_fingerprint_tells_models_apart(text_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert Tokenizer(tokenizer.path).fingerprint == tokenizer.fingerprint
    assert train_tokenizer([text_file], tmp_path / "m.model", 340).fingerprint != tokenizer.fingerprint
