"""The one place that reads a text file named by a user: UTF-8, of a sane size, without characters that mislead."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from stablemoe_ds.config.messages import printable
from stablemoe_ds.errors import UserError
from stablemoe_ds.files import open_file

LARGEST_YAML = 1 << 17
"""Bytes of a run, a suite or a cluster, which take up to some seconds to read."""
LARGEST_LIST = 1 << 22
"""Bytes of a list that is read line by line, or of a small JSON file."""
LARGEST_MANIFEST = 1 << 28
"""Bytes of a manifest, which names every tensor of a model."""

_OTHER = (  # the longer ones first: UTF-32's mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f]")


def read_text(path: str | Path, what: str, largest: int) -> str:
    """A file's text, its lines ended by a newline each; a byte order mark is left out.

    what: names the content in an error, e.g. "a short YAML file". largest: bytes it may have.
    Raises UserError for a file that is missing, no plain file, too large, of another encoding, or holds control
    characters; FileNotFoundError is then its cause if the file is missing.
    """
    where = printable(str(path))
    try:
        with open_file(path) as file:
            data = file.read(largest + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{where}: cannot read it: {reason}; expected {what}") from error
    if len(data) > largest:
        raise UserError(f"{where}: larger than {largest} bytes; expected {what}")
    return _decoded(data, where, what)


def read_json(path: str | Path, what: str, largest: int) -> dict[str, Any]:
    """The JSON object of a file. Raises UserError as :func:`read_text` does, and for anything else than an object."""
    text = read_text(path, what, largest)
    where = printable(str(path))
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: invalid JSON: {printable(str(error))}; expected {what}") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: holds no JSON object; expected {what}")
    return found


def _decoded(data: bytes, where: str, what: str) -> str:
    for mark, encoding in _OTHER:
        if data.startswith(mark):
            raise UserError(f"{where}: {encoding} text; expected {what} in UTF-8: save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{where}:{line}: byte {error.start} is not UTF-8 text (0x{data[error.start]:02x}; Latin-1?); expected "
            f"{what}: save it as UTF-8"
        ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if odd := _CONTROL.search(text):
        before = text[: odd.start()]
        place = f"{where}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        hint = "UTF-16 without its mark? save it as UTF-8" if odd[0] == "\0" else "take it out"
        raise UserError(f"{place}: the character U+{ord(odd[0]):04X} is not allowed in {what}: {hint}")
    return text
