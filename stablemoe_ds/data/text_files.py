"""Files that hold text: which they are, how they are opened. What a file is follows from its bytes, not its name."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from stablemoe_ds.data.compression import ERRORS, Compression, compression_of, decompressed
from stablemoe_ds.data.signatures import HEAD, Kind, is_json_lines, json_kind, kind_of
from stablemoe_ds.errors import UserError, one_line

Format = Literal["text", "jsonl", "parquet"]

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Reading:
    """How files are to be read.

    format: None to tell from the first bytes of each; "text" takes any file for plain text, "jsonl" for JSON lines.
    field: of JSON lines and Parquet, the field or column that holds the text; None is "text".
    allow_damaged: read on where more is unreadable than text may have, leaving out records without a text.
    """

    format: Literal["text", "jsonl"] | None = None
    field: str | None = None
    allow_damaged: bool = False


AS_FOUND = Reading()


@dataclass(frozen=True)
class TextFile:
    """A file that has been looked at. field: where in a record its text is."""

    path: Path
    format: Format = "text"
    compression: Compression | None = None
    field: str = "text"


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
            raise UserError(f"text file {path} cannot be read by this user")
    return paths


def recognise(files: Sequence[Path | str], reading: Reading) -> list[TextFile]:
    """Look at the first bytes of each file. Raises UserError, naming it, if one cannot be read or is not text."""
    found: list[TextFile] = []
    refused: list[tuple[Path, Kind]] = []
    for path in check_files(files):
        file = _look_at(path, reading)
        if isinstance(file, Kind):
            refused.append((path, file))
        else:
            found.append(file)
    if refused:
        path, kind = refused[0]
        more = f"; {len(refused) - 1} more files are no text either" if len(refused) > 1 else ""
        raise UserError(f"{path} is {kind.name}: {kind.remedy}{more}")
    if reading.field is not None and all(file.format == "text" for file in found):
        raise UserError(
            f"field {reading.field!r} was named, but {found[0].path} is plain text, without fields; "
            "expected JSON lines or Parquet, or leave --field out"
        )
    return found


def _look_at(path: Path, reading: Reading) -> TextFile | Kind:
    field = reading.field or "text"
    compression = _compression(path)
    with open_text(TextFile(path, "text", compression)) as file:
        head = file.read(HEAD)
    if reading.format:
        return TextFile(path, reading.format, compression, field)
    if head.startswith(b"PAR1"):
        if compression:
            return Kind(f"Parquet inside {compression}", "decompress it first: Parquet compresses by itself")
        return TextFile(path, "parquet", None, field)
    if inner := compression_of(head):
        return Kind(f"compressed twice, {inner} inside {compression}", "decompress it once")
    head = head.removeprefix(BOM)
    if kind := kind_of(head):
        return kind
    if is_json_lines(head):
        return TextFile(path, "jsonl", compression, field)
    named_so = {".jsonl", ".ndjson"} & {suffix.lower() for suffix in path.suffixes[-2 if compression else -1 :]}
    return json_kind(head) or TextFile(path, "jsonl" if named_so else "text", compression, field)


def _compression(path: Path) -> Compression | None:
    try:
        with path.open("rb") as file:
            return compression_of(file.read(16))
    except OSError as error:
        raise UserError(f"cannot read text file {path}: {error}") from error


def text_size(path: Path) -> int:
    """Bytes of text in a file; compressed text is taken to be four times its size on disk. Raises UserError."""
    factor = 4 if _compression(path) else 1
    try:
        return path.stat().st_size * factor
    except OSError as error:
        raise UserError(f"cannot read text file {path}: {error}") from error


@contextmanager
def open_text(file: TextFile) -> Iterator[BinaryIO]:
    """Open a file of text or JSON lines for reading bytes; whatever goes wrong in the block is a UserError."""
    try:
        with file.path.open("rb") as raw:
            yield decompressed(raw, file.compression) if file.compression else raw
    except ERRORS as error:
        raise UserError(f"cannot read text file {file.path}: {one_line(error)}") from error


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
