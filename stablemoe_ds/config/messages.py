"""Pydantic's findings as messages for a person who edits a YAML file: one line for each finding."""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.config.section import Section

MOST = 20
CONTEXT = 16
"""Characters shown before and behind the part in which two values differ."""
KINDS = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list, e.g. [1, 2]",
    "tuple_type": "a list, e.g. [0.9, 0.98]",
    "dict_type": "a section: keys and values below it",
    "model_type": "a section: keys and values below it",
}
BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def error_messages(error: ValidationError, origin: Callable[[str], str], schema: type[Section] = RunConfig) -> str:
    """All findings, one a line: ``FILE: key.path: got VALUE: what was expected; nearest that works``.

    origin: names where the value of a dotted key came from (the file, or an override).
    schema: what was to be read.
    """
    found = error.errors(include_url=False)
    lines = []
    for details in found[:MOST]:
        key = dotted(details["loc"])
        lines.append(f"{origin(key)}: {key + ': ' if key else ''}{_reason(details, schema)}")
    if len(found) > MOST:
        lines.append(f"... and {len(found) - MOST} more")
    return "\n".join(lines)


def breach(key: str, value: Any, expected: str, nearest: object) -> str:
    """One line for a setting that breaks a rule."""
    return f"{key}: got {show(value)}: {expected}; nearest that works: {nearest}"


def show(value: Any) -> str:
    """A value as it would stand in YAML, cut to a readable length."""
    return cut(json.dumps(value, ensure_ascii=False, default=repr))


def show_both(one: Any, other: Any, most: int = 60) -> tuple[str, str]:
    """Two values that are not the same, each as :func:`show` has it; of long ones the part that differs.

    What both begin and end with is left out but for a few characters, so that the first difference is always seen.
    """
    both = [json.dumps(value, ensure_ascii=False, default=repr) for value in (one, other)]
    if len({unicodedata.normalize("NFKC", text) for text in both}) == 1:  # they would look alike
        both = [json.dumps(value, default=repr) for value in (one, other)]
    if max(map(len, both)) > most:
        start = _shared(*both)
        end = min(_shared(both[0][::-1], both[1][::-1]), min(map(len, both)) - start)
        both = [_around(text, start, len(text) - end, most) for text in both]
    return printable(both[0]), printable(both[1])


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _around(text: str, start: int, end: int, most: int) -> str:
    """The part of ``text`` from ``start`` to ``end`` with a little of what is before and behind it."""
    before = max(0, start - CONTEXT)
    behind = min(len(text), end + CONTEXT, before + most)
    return "..." * (before > 0) + text[before:behind] + "..." * (behind < len(text))


def cut(text: str, most: int = 60) -> str:
    """Text of at most ``most`` characters that any terminal can print, so that a message stays one line."""
    return printable(text if len(text) <= most else text[: most - 3] + "...")


def printable(text: str) -> str:
    """Text on one line: whatever cannot be printed is escaped as in Python."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def dotted(location: tuple[int | str, ...]) -> str:
    """``("data", "train", 0)`` as ``data.train.0``; a key that is no name in quotes."""
    return ".".join(show(part) if isinstance(part, str) and not part.isidentifier() else str(part) for part in location)


def nearest_key(location: tuple[int | str, ...], schema: type[Section] = RunConfig) -> str:
    """The known key most like an unknown one: next to it if possible, else of another section."""
    *parents, last = location
    wrong = str(last)[:60]
    section = _section(parents, schema)
    known = list(section.model_fields) if section else []
    elsewhere = {path.rsplit(".", 1)[-1]: path for path in reversed(known_keys(schema))}
    if close := difflib.get_close_matches(wrong, known, 1, 0.6):
        return dotted((*parents, close[0]))
    if close := difflib.get_close_matches(wrong, elsewhere, 1, 0.8):
        return elsewhere[close[0]]
    return dotted((*parents, *difflib.get_close_matches(wrong, known, 1, 0.0)))


def _reason(details: ErrorDetails, schema: type[Section]) -> str:
    kind, location, value = details["type"], details["loc"], details["input"]
    field = _field(location, schema)
    if kind == "extra_forbidden":
        return f"unknown key; did you mean {nearest_key(location, schema)}?"
    if kind == "missing":
        inner = section_of(field.annotation) if field else None
        return f"missing: {(field and field.description) or (inner and inner.__doc__) or 'a value'}"
    if kind == "value_error":
        message = str(details["ctx"]["error"])
        return message if isinstance(value, dict) else f"got {show(value)}: {message}"
    if kind in KINDS:
        expected = KINDS[kind]
    elif kind in BOUNDS:
        bound, words = BOUNDS[kind]
        expected = f"{words} {details['ctx'][bound]:g}"
    elif kind == "literal_error":
        expected = str(details["ctx"]["expected"]).replace("'", "")
    else:
        expected = details["msg"][0].lower() + details["msg"][1:]
    near = _nearest(kind, value, field)
    return f"got {show(value)}: expected {expected}" + (f"; nearest that works: {near}" if near else "")


def _nearest(kind: str, value: Any, field: FieldInfo | None) -> str | None:
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if kind == "literal_error" and field and isinstance(value, str):
        options = [option for option in get_args(field.annotation) if isinstance(option, str)]
        return next(iter(difflib.get_close_matches(value[:60], options, 1, 0.4)), None)
    if kind == "int_type" and number and round(value) > 0:
        return str(round(value))
    if kind == "string_type" and number:
        return f'"{value}" (in quotes)'
    if field and not field.is_required() and field.default not in (PydanticUndefined, None):
        return f"{show(field.default)} (the default)"
    return None


def section_of(annotation: Any) -> type[Section] | None:
    """The section an annotation holds, through lists and ``| None``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def _section(location: list[int | str], schema: type[Section]) -> type[Section] | None:
    section: type[Section] | None = schema
    for part in location:
        if section is not None and isinstance(part, str):
            field = section.model_fields.get(part)
            section = section_of(field.annotation) if field else None
    return section


def _field(location: tuple[int | str, ...], schema: type[Section]) -> FieldInfo | None:
    section = _section(list(location[:-1]), schema) if location else None
    return section.model_fields.get(str(location[-1])) if section else None


@cache
def known_keys(section: type[Section] = RunConfig) -> tuple[str, ...]:
    """Every dotted key of a section, in the schema's order."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        below = section_of(field.annotation)
        keys += [name, *(f"{name}.{key}" for key in known_keys(below))] if below else [name]
    return tuple(keys)
