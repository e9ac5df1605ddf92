"""Text files as a stream of documents, whatever is in them."""

from __future__ import annotations

import gzip
import logging
import lzma
import os
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from stablemoe_ds.errors import UserError

Documents = Literal["file", "line", "wiki"]
"""What one document is: a whole file; a line; or an article that starts with a line ``= Title =``."""

BOM = b"\xef\xbb\xbf"
TITLE = re.compile(rb" ?= (?!=).+ =\s*")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file, cut between two documents. ``end`` is None for "to the end"."""

    path: Path
    start: int = 0
    end: int | None = None

    @property
    def size(self) -> int:
        """Bytes of text, estimated where the file is compressed."""
        return text_size(self.path) if self.end is None else self.end - self.start


def check_files(files: Sequence[Path | str]) -> list[Path]:
    """Return the files as paths. Raises UserError if there is none or one of them cannot be read."""
    paths = [Path(file) for file in files]
    if not paths:
        raise UserError("no text file was named: expected at least one")
    for path in paths:
        if not path.is_file():
            what = "does not exist"
            if path.is_dir():
                what = "is a directory: name the files in it"
            elif path.exists():
                what = "is a pipe or a device, which cannot be read twice: write the text to a file"
            raise UserError(f"text file {path} {what}")
        if not os.access(path, os.R_OK):
            raise UserError(f"text file {path} may not be read by this user")
    return paths


def text_size(path: Path) -> int:
    """Bytes of text in a file; compressed text is taken to be four times its size on disk. Raises UserError."""
    try:
        return path.stat().st_size * (4 if _compressed(path) else 1)
    except OSError as error:
        raise UserError(f"cannot read text file {path}: {error}") from error


def _compressed(path: Path) -> bool:
    return path.suffix in (".gz", ".xz")


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a plain, .gz or .xz file for reading bytes; whatever goes wrong in the block is a UserError."""
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rb") as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"cannot read text file {path}: {error}") from error


def decode(raw: bytes) -> tuple[str, int]:
    """Bytes to text; what is not UTF-8 becomes U+FFFD. Returns the text and how many times that happened."""
    try:
        return raw.decode(), 0
    except UnicodeDecodeError:
        text = raw.decode(errors="replace")
        return text, text.count("\ufffd") - raw.count("\ufffd".encode())


def warn_invalid(count: int) -> None:
    """Tell that ``count`` byte sequences were not UTF-8. Silent at 0."""
    if count:
        logger.warning(
            "%d byte sequences were not UTF-8 and were read as U+FFFD; convert the files if that is much", count
        )


def plan_spans(files: Sequence[Path], documents: Documents, size: int) -> list[Span]:
    """Cut files between documents into spans of about ``size`` bytes; file order and text order are kept.

    A compressed file, and a file that is one document, stay whole.
    """
    spans = []
    for path in files:
        if documents == "file" or _compressed(path):
            spans.append(Span(path))
            continue
        length, start = text_size(path), 0
        with open_text(path) as file:
            while start < length:
                end = _next_document(file, start + size, length, documents)
                spans.append(Span(path, start, end))
                start = end
    return spans


def _next_document(file: BinaryIO, position: int, length: int, documents: Documents) -> int:
    """Offset of the first document that starts at ``position`` or later; ``length`` if none does."""
    if position >= length:
        return length
    file.seek(position - 1)
    file.readline()
    while documents == "wiki" and file.tell() < length:
        start = file.tell()
        if TITLE.fullmatch(file.readline()):
            return start
    return file.tell()


def read_documents(span: Span, documents: Documents) -> Iterator[bytes]:
    """Yield the documents of a span. White space alone is no document; a line comes without its line end."""
    with open_text(span.path) as file:
        if span.start:
            file.seek(span.start)
        for document in _cut(_lines(file, span), documents):
            if document.strip():
                yield document


def _lines(file: BinaryIO, span: Span) -> Iterator[bytes]:
    """Lines of a span with their ends, without a byte order mark."""
    position = span.start
    for line in file:
        yield line.removeprefix(BOM) if position == 0 else line
        position += len(line)
        if span.end is not None and position >= span.end:
            return
    if span.end is not None:
        raise UserError(f"text file {span.path} became shorter while it was read: start again when nobody writes to it")


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


def split_files(files: Sequence[Path | str], fraction: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Hold out about ``fraction`` of the text, in whole files chosen by ``seed``: (train, held out), each sorted.

    Raises UserError unless both parts get a file.
    """
    paths = sorted(check_files(files))
    if not 0 < fraction < 1 or len(paths) < 2:
        raise UserError(
            f"cannot hold out {fraction} of {len(paths)} files: expected a fraction in (0, 1) and 2 files or more"
        )
    random.Random(seed).shuffle(paths)
    wanted, held = fraction * sum(map(text_size, paths)), 0
    for count, path in enumerate(paths, start=1):
        held += text_size(path)
        if held >= wanted or count == len(paths) - 1:
            break
    return sorted(paths[count:]), sorted(paths[:count])
