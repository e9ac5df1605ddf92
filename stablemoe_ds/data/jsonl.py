"""JSON lines: an object on each line, one of its fields a text."""

from __future__ import annotations

import json
import re

from stablemoe_ds.errors import one_line

SURROGATES = re.compile("[\ud800-\udfff]")


class BrokenRecordError(Exception):
    """A line without a text. The message goes on after "line 7, which ..."."""


def text_of(line: bytes, field: str) -> tuple[str, int]:
    """The text in one field, and how many characters of it had to become U+FFFD.

    Those are bytes that are not UTF-8 and halves of surrogate pairs, which JSON can write and UTF-8 cannot.
    Raises BrokenRecordError.
    """
    try:
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise BrokenRecordError("is nested too deeply") from None
    except ValueError as error:
        raise BrokenRecordError(f"is not JSON ({one_line(error)[:60]})") from None
    if not isinstance(record, dict):
        raise BrokenRecordError(f"is {_kind(record)}, expected an object")
    if field not in record:
        others = ", ".join(f"{key[:20]!r}" for key in list(record)[:6])
        raise BrokenRecordError(f"has no field {field!r} (its fields: {others or 'none'}; name one with --field)")
    text = record[field]
    if not isinstance(text, str):
        raise BrokenRecordError(f"has {_kind(text)} in field {field!r}, expected a string")
    return SURROGATES.subn("\ufffd", text)


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {dict: "an object", list: "an array", str: "a string"}
    return kinds.get(type(value), "a number")
