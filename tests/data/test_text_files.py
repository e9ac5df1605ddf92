"""What a file is follows from its bytes: what is read, and what is refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import sqlite3
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.numpy import save

from stablemoe_ds.data.compression import zstd
from stablemoe_ds.data.flaws import Flaws
from stablemoe_ds.data.prepare import prepare
from stablemoe_ds.data.text import plan_spans, read_documents
from stablemoe_ds.data.text_files import Reading, recognise
from stablemoe_ds.data.tokenizer import Tokenizer, train_tokenizer
from stablemoe_ds.errors import UserError
from tests.data.hostile import CUTS, FLIPS, Damage, complaint

TEXT = "".join(f"{n}: some words, and été {n * n}\n" for n in range(500)).encode()
TIFF_BEFORE = b"\x28\xb5\x2f\xfd"


def lines_of(path: Path, reading: Reading | None = None) -> list[bytes]:
    """Documents of a file, read in parts of some hundred bytes."""
    spans = plan_spans(recognise([path], reading or Reading()), "line", 700)
    return [document.raw for span in spans for document in read_documents(span, "line", Flaws())]


def checked_zstd(text: bytes) -> bytes:
    """As the command line writes it: with a checksum, which the library leaves out unless asked."""
    return zstd.compress(text, options={zstd.CompressionParameter.checksum_flag: 1})


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": checked_zstd,
}


@pytest.mark.parametrize("name", ["text.gz", "TEXT.GZ", "text.txt.Zst", "text", "text.txt"])
@pytest.mark.parametrize("packer", PACKERS)
def test_compression_is_told_from_the_bytes(tmp_path: Path, packer: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(PACKERS[packer](TEXT))
    assert lines_of(path) == TEXT.splitlines()


def test_a_name_alone_makes_no_compression(tmp_path: Path) -> None:
    path = tmp_path / "text.gz"
    path.write_bytes(b"BZh is how bzip2 begins\n")
    assert lines_of(path) == [b"BZh is how bzip2 begins"]


@pytest.mark.parametrize("padding", [b"", b"\0" * 8, b"\0" * 100_000])
@pytest.mark.parametrize("packer", PACKERS)
def test_all_members_are_read(tmp_path: Path, packer: str, padding: bytes) -> None:
    path = tmp_path / "text"
    members = [PACKERS[packer](part) for part in (TEXT[:1000], b"", TEXT[1000:])]
    path.write_bytes(padding.join([*members, b""]))
    assert lines_of(path) == TEXT.splitlines()


def test_large_zstd_window_and_frame_to_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "text"
    options = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.enable_long_distance_matching: 1}
    path.write_bytes(b"\x50\x2a\x4d\x18\3\0\0\0abc" + zstd.compress(TEXT, options=options))
    assert lines_of(path) == TEXT.splitlines()


@pytest.mark.parametrize("packer", PACKERS)
@given(damage=CUTS | FLIPS)
@settings(max_examples=60, deadline=None)
def test_damaged_compressed_file_is_refused_or_read_whole(
    tmp_path_factory: pytest.TempPathFactory, packer: str, damage: Damage
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.txt"
    good = PACKERS[packer](TEXT[:2000]) + PACKERS[packer](TEXT[2000:4000])
    path.write_bytes(damage(good))
    found: list[bytes] = []

    def read() -> None:
        found.extend(lines_of(path))

    # A cut between two members leaves a whole file; the header of a gzip file is in no checksum, but is no text either.
    if complaint(read, path.name) is None and found:
        texts = (TEXT[:2000].splitlines(), TEXT[:4000].splitlines())
        assert found in texts or recognise([path], Reading())[0].compression is None


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("tail", [b"no member", b"BZh91AY&SY", b"\xfd7zXZ\0", b"\x1f\x8b\x08", TIFF_BEFORE])
def test_what_follows_the_last_member_is_not_dropped(tmp_path: Path, packer: str, tail: bytes) -> None:
    path = tmp_path / "text.packed"
    path.write_bytes(PACKERS[packer](TEXT) + tail)
    assert complaint(lambda: lines_of(path), "text.packed")


def archive(name: str, content: bytes = TEXT) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("[Content_Types].xml", "<Types/>")
        file.writestr(name, content)
    return out.getvalue()


def tar(format: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as file:
        member = tarfile.TarInfo("a.txt")
        member.size = len(TEXT)
        file.addfile(member, io.BytesIO(TEXT))
    return out.getvalue()


def old_tar() -> bytes:
    """As before POSIX: no mark, but the checksum of the header."""
    content = bytearray(tar(tarfile.USTAR_FORMAT))
    content[257:265] = b"\0" * 8
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return bytes(content)


def saved(write: Callable[[io.BytesIO], object]) -> bytes:
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def database() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("create table texts (text)")
        return connection.serialize()


RECORDS = [{"id": n, "text": f"number {n}"} for n in range(3000)]
TEXT16 = TEXT.decode().encode
REFUSED: dict[str, tuple[bytes, str]] = {
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\n" + TEXT, "a PDF document"),
    "rtf": (b"{\\rtf1\\ansi text}", "an RTF document"),
    "doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "Microsoft Office"),
    "docx": (archive("word/document.xml"), "a Word document"),
    "xlsx": (archive("xl/workbook.xml"), "an Excel workbook"),
    "zip": (archive("a.txt"), "a ZIP archive"),
    "tar": (tar(tarfile.PAX_FORMAT), "a tar archive"),
    "gnu tar": (tar(tarfile.GNU_FORMAT), "a tar archive"),
    "old tar": (old_tar(), "a tar archive"),
    "tar.gz": (gzip.compress(tar(tarfile.GNU_FORMAT)), "a tar archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
    "lz4": (b"\x04\x22\x4d\x18" + TEXT, "an lz4 file"),
    "gz.gz": (gzip.compress(gzip.compress(TEXT)), "compressed twice"),
    "elf": (Path(sys.executable).read_bytes()[:100_000], "an ELF program"),
    "pyc": (Path(json.__cached__).read_bytes(), "compiled Python"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG image"),
    "jpeg": (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG image"),
    "sqlite": (database(), "an SQLite database"),
    "npy": (saved(lambda out: np.save(out, np.arange(9))), "a numpy array"),
    "npz": (saved(lambda out: np.savez(out, a=np.arange(9))), "a numpy archive"),
    "pickle": (pickle.dumps({"a": 1}), "a pickled Python object"),
    "torch": (saved(lambda out: torch.save({"a": torch.zeros(3)}, out)), "a PyTorch file"),
    "safetensors": (save({"a": np.zeros(3)}), "a safetensors file"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(20), "a GGUF model"),
    "utf-16": (TEXT16("utf-16"), "UTF-16 text"),
    "utf-16 big-endian": (TEXT16("utf-16-be"), "UTF-16BE text"),
    "utf-16 without mark": (TEXT16("utf-16-le"), "UTF-16LE text"),
    "utf-32": (TEXT16("utf-32"), "UTF-32 text"),
    "utf-32 without mark": (TEXT16("utf-32-be"), "UTF-32BE text"),
    "html": (b"\xef\xbb\xbf\n<!-- saved from -->\n<!DOCTYPE HTML>\n<p>text", "an HTML page"),
    "xml.bz2": (bz2.compress(b'<mediawiki xmlns="http://www.mediawiki.org/xml/">\n' + TEXT), "an XML document"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "array": (json.dumps(RECORDS).encode(), "a JSON array"),
    "array, indented": (json.dumps(RECORDS, indent=1).encode(), "a JSON array"),
    "array of texts": (b'["one", "two"]\n', "a JSON array"),
    "document": (json.dumps({"texts": ["a"]}, indent=2).encode(), "one JSON document"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    content, kind = REFUSED[name]
    path = tmp_path / "some.txt"
    path.write_bytes(content)
    for read in (
        lambda: prepare([path], tokenizer, tmp_path / "out"),
        lambda: train_tokenizer([path], tmp_path / "m", 300),
    ):
        assert kind in (complaint(read, "some.txt") or "")
    assert list(tmp_path.iterdir()) == [path]


def test_a_tokenizer_and_a_corpus_are_no_text(tmp_path: Path, tokenizer: Tokenizer, corpus: Callable[..., str]) -> None:
    prefix = corpus("as-text", 50)
    for path, kind in ((tokenizer.path, "a sentencepiece model"), (Path(f"{prefix}.idx"), "a prepared corpus")):
        assert kind in (complaint(lambda path=path: lines_of(path), path.name) or "")  # type: ignore[misc]


def test_all_that_is_refused_is_counted(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.txt", "b.pdf", "c.zip", "d.txt")]
    for file, content in zip(files, (TEXT, REFUSED["pdf"][0], REFUSED["zip"][0], b""), strict=True):
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"b\.pdf is a PDF document: .*; 1 more files are no text"):
        recognise(files, Reading())


HARMLESS = {
    "letters of programs": b"MZ and ORC and PK and BM and GIF are letters\n",
    "pdf inside": b"the first bytes are %PDF-1.7\n",
    "python": b'["a"].append(1)\n{"a": 1}\n',
    "markdown": b"[link](http://x)\n[ ] to do\n",
    "brace": b'{"an umlaut} in TeX\n',
    "tag": b"<p> is a tag, <html> another\n",
    "escape": b"\x1b[31mred\x1b[0m and a bell\x07\n",
    "comments": b"<!-- a -->" * 2000 + b" in Markdown\n",
    "blank": b" " * 100_000 + b"x\n",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_text_is_not_taken_for_something_else(tmp_path: Path, name: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(HARMLESS[name])
    assert lines_of(path) == HARMLESS[name].splitlines()


@pytest.mark.parametrize("name", ["html", "document", "array of texts", "lfs"])
def test_plain_text_by_request(tmp_path: Path, name: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(REFUSED[name][0])
    wanted = [line for line in REFUSED[name][0].removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
    assert lines_of(path, Reading(format="text")) == wanted


UNREADABLE = {
    "latin-1": "caf\xe9 cr\xe8me ".encode("latin-1") * 50,
    "nothing but NUL": bytes(5000),
    "NUL at the end": TEXT + bytes(len(TEXT) // 50),
    "random": random.Random(0).randbytes(5000),
    "ids": np.arange(100, 5100, dtype=np.uint16).tobytes(),
    "U+FFFD": "was \ufffd before ".encode() * 50,
    "shift-jis": "日本語の文章。".encode("shift-jis") * 50,
}


@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 1) for name in UNREADABLE), ("latin-1", 2), ("NUL at the end", 2)]
)
def test_more_than_a_hundredth_unreadable_is_an_error(
    tmp_path: Path, tokenizer: Tokenizer, name: str, workers: int
) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_bytes(TEXT * 10)
    bad.write_bytes(UNREADABLE[name])
    files = [good, bad, good]
    out = tmp_path / "out"
    assert "%" in (complaint(lambda: prepare(files, tokenizer, out, workers), "bad.txt is not UTF-8") or "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "good.txt"]
    assert complaint(lambda: train_tokenizer(files, tmp_path / "m", 300), "bad.txt is not UTF-8")
    everything = Reading(allow_damaged=True)
    assert prepare(files, tokenizer, out, workers, reading=everything).words > 0
    complaint(lambda: train_tokenizer(files, tmp_path / "m", 350, reading=everything), "vocabulary of 350")


@pytest.mark.parametrize(("bad", "fine"), [(10, True), (11, False)])
def test_the_share_is_of_the_whole_file(
    tmp_path: Path, tokenizer: Tokenizer, bad: int, fine: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """1000 characters, the unreadable ones in the first of its lines; read in spans or whole, by the head or not."""
    path = tmp_path / "some.txt"
    path.write_bytes(b"\xff" * bad + b"x" * (100 - bad) + (b"\n" + b"y" * 100) * 9)
    found = complaint(lambda: prepare([path], tokenizer, tmp_path / "out"), "some.txt")
    assert (found is None) == fine
    assert f"{bad} byte sequences were not UTF-8" in (caplog.text if fine else found or "")
    assert f"{bad / 10:.2g} % of 1,000 characters" in (caplog.text if fine else found or "")


def test_line_without_an_end_is_refused_before_memory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stablemoe_ds.data.text.LONGEST_LINE", 1000)
    for number, content in enumerate((b"x" * 999 + b"\n" + b"y" * 999 + b"\n", b"x" * 1000 + b"\n", b"x" * 5000)):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(content)
        packed = tmp_path / f"{number}.gz"
        packed.write_bytes(gzip.compress(content))
        for file in (path, packed):
            assert (complaint(lambda file=file: lines_of(file), file.name) is None) == (number == 0)  # type: ignore[misc]


def test_a_small_file_that_unpacks_to_a_very_long_line(tmp_path: Path) -> None:
    """A quarter of a gigabyte in some hundred kilobytes."""
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(260):
            file.write(b"x" * (1 << 20))
    assert os.path.getsize(path) < 5_000_000
    assert complaint(lambda: lines_of(path), "more than 256 MiB")


def test_field_for_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(TEXT)
    assert complaint(lambda: recognise([path], Reading(field="body")), "some.txt is plain text")
