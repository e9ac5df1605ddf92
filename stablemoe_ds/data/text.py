"""Files of text as a stream of documents: plain text, JSON lines or Parquet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal, NamedTuple

from stablemoe_ds.data.flaws import Flaws
from stablemoe_ds.data.jsonl import BrokenRecordError, text_of
from stablemoe_ds.data.parquet import read_rows, row_groups
from stablemoe_ds.data.text_files import BOM, TextFile, open_text, text_size
from stablemoe_ds.errors import UserError

Documents = Literal["file", "line", "wiki"]
"""What one document of plain text is: a whole file; a line; or an article that starts with a line ``= Title =``.

A line of JSON and a row of Parquet are one document each, whatever is said here.
"""
TITLE = re.compile(rb" ?= (?!=).+ =\s*")
LONGEST_LINE = 1 << 28
"""Bytes; a longer line is hardly text, and would not fit in memory together with its ids."""


@dataclass(frozen=True)
class Span:
    """A part of a file, cut between two documents.

    start, end: bytes [start, end) of text or JSON lines, where end None is "to the end"; row groups of Parquet.
    size: bytes of text, estimated where the file is compressed.
    """

    file: TextFile
    start: int = 0
    end: int | None = None
    size: int = 0


class Document(NamedTuple):
    """A text, and the bytes it was read from (of JSON and Parquet, its UTF-8)."""

    text: str
    raw: bytes


def decode(raw: bytes) -> tuple[str, int]:
    """Bytes to text; what is not UTF-8 becomes U+FFFD. Returns the text and how many times that happened."""
    try:
        return raw.decode(), 0
    except UnicodeDecodeError:
        text = raw.decode(errors="replace")
        return text, text.count("\ufffd") - raw.count("\ufffd".encode())


def plan_spans(files: Sequence[TextFile], documents: Documents, size: int) -> list[Span]:
    """Cut files between documents into spans of about ``size`` bytes; file order and text order are kept.

    A compressed file, and a file that is one document, stay whole. Raises UserError.
    """
    spans: list[Span] = []
    for file in files:
        if file.format == "parquet":
            spans += _plan_parquet(file, size)
        elif file.compression or (documents == "file" and file.format == "text"):
            spans.append(Span(file, size=text_size(file.path)))
        else:
            length, start = text_size(file.path), 0
            with open_text(file) as content:
                while start < length:
                    end = _next_document(content, file, start + size, length, documents)
                    spans.append(Span(file, start, end, end - start))
                    start = end
    return spans


def _plan_parquet(file: TextFile, size: int) -> Iterator[Span]:
    """Row groups one after the other, as many to a span as have about ``size`` bytes."""
    start = collected = 0
    sizes = row_groups(file.path, file.field)
    for number, group in enumerate(sizes, 1):
        collected += group
        if collected >= size or number == len(sizes):
            yield Span(file, start, number, collected)
            start, collected = number, 0


def _next_document(content: BinaryIO, file: TextFile, position: int, length: int, documents: Documents) -> int:
    """Offset of the first document that starts at ``position`` or later; ``length`` if none does."""
    if position >= length:
        return length
    content.seek(position - 1)
    _read_line(content, file)
    while documents == "wiki" and file.format == "text" and content.tell() < length:
        start = content.tell()
        if TITLE.fullmatch(_read_line(content, file)):
            return start
    return content.tell()


def _read_line(content: BinaryIO, file: TextFile) -> bytes:
    """The next line with its end; empty at the end of the file. Raises UserError for one without an end in sight."""
    line = content.readline(LONGEST_LINE)
    if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
        raise UserError(
            f"text file {file.path} has a line of more than {LONGEST_LINE >> 20} MiB, which is too long: "
            "break it into lines"
        )
    return line


def read_documents(span: Span, documents: Documents, flaws: Flaws) -> Iterator[Document]:
    """Yield the documents of a span, and count in ``flaws`` what could not be read in them.

    White space alone is no document; a line comes without its line end; records without a text are left out.
    """
    read = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[span.file.format]
    for raw, invalid in read(span, documents, flaws):
        if raw.strip():
            text, bad = decode(raw)
            flaws.count(text, raw, invalid + bad)
            yield Document(text, raw)


def _read_text(span: Span, documents: Documents, flaws: Flaws) -> Iterator[tuple[bytes, int]]:
    with open_text(span.file) as content:
        for raw in _cut((line for _, line in _lines(content, span)), documents):
            yield raw, 0


def _read_jsonl(span: Span, documents: Documents, flaws: Flaws) -> Iterator[tuple[bytes, int]]:
    with open_text(span.file) as content:
        for position, line in _lines(content, span):
            if not line.strip():
                continue
            flaws.records += 1
            try:
                text, invalid = text_of(line, span.file.field)
            except BrokenRecordError as error:
                flaws.broken += 1
                flaws.first = flaws.first or (position, str(error))
            else:
                yield text.encode(), invalid


def _read_parquet(span: Span, documents: Documents, flaws: Flaws) -> Iterator[tuple[bytes, int]]:
    for row, text in read_rows(span.file.path, span.file.field, span.start, span.end or 0):
        flaws.records += 1
        if text is None:
            flaws.broken += 1
            flaws.first = flaws.first or (row, f"has null in column {span.file.field!r}")
        else:
            yield text, 0


def _lines(content: BinaryIO, span: Span) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its end) of a span, without a byte order mark."""
    if span.start:
        content.seek(span.start)
    position = span.start
    while line := _read_line(content, span.file):
        yield position, line.removeprefix(BOM) if position == 0 else line
        position += len(line)
        if span.end is not None and position >= span.end:
            return
    if span.end is not None:
        raise UserError(
            f"text file {span.file.path} became shorter while it was read: try again when nothing writes to it"
        )


def _cut(lines: Iterator[bytes], documents: Documents) -> Iterator[bytes]:
    if documents == "line":
        yield from (line.removesuffix(b"\n").removesuffix(b"\r") for line in lines)
        return
    parts: list[bytes] = []
    for line in lines:
        if documents == "wiki" and TITLE.fullmatch(line):
            yield b"".join(parts)
            parts = []
        parts.append(line)
    yield b"".join(parts)
