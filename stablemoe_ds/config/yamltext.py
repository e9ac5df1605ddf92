"""YAML text to plain values and back: the small, unambiguous part of YAML that a run needs.

ruamel.yaml reads the text by the rules of YAML 1.2, where ``6e-4`` is a number, ``no`` and ``1:30`` are text and
``010`` is ten. What could surprise is refused, always with its line and column: aliases and merge keys (a few lines of
them unfold to gigabytes), tags, dates, numbers that are infinite or none, keys that are repeated or no text.

PyYAML writes, and puts quotes around all text that a reader of either version would take for something else.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    CollectionEndEvent,
    Event,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceStartEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.resolver import Resolver

from stablemoe_ds.config.messages import cut
from stablemoe_ds.errors import UserError

TAG = "tag:yaml.org,2002:"
DEEPEST = 40
LARGEST = 2**63
_RULES = Resolver()
"""Which type a scalar without quotes has in YAML 1.2; a ``%YAML 1.1`` at the top of a file changes nothing."""


class _Dumper(yaml.SafeDumper):
    """PyYAML quotes what YAML 1.1 takes for something else than text; here also what looks like a number of 1.2."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(TAG + "float", re.compile(r"[-+.]*[0-9_][0-9A-Za-z_.+-]*$"), list("-+.0123456789"))


def parse(text: str, where: str) -> Any:
    """Read one YAML document; None if it is empty.

    where: what to call the text in an error. Raises UserError with line and column if it cannot be read.
    """
    try:
        return _document(_events(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = mark.line, mark.column
        reason = ", ".join(filter(None, (error.context, error.problem)))
    except ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n"), len(before) - before.rfind("\n") - 1
        reason = f"the character U+{error.character:04X} is not allowed"
    raise UserError(f"{where}:{line + 1}:{column + 1}: invalid YAML: {cut(reason, 200)}")


def dump(tree: Any) -> str:
    """The YAML text that :func:`parse` reads back as ``tree``; keys keep their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=110)


def _events(text: str) -> Iterator[Event]:
    """What ruamel.yaml's parser finds, in order: where a section, a list or a scalar begins, and where one ends."""
    reader = YAML(typ="safe", pure=True)
    try:
        for event in reader.parse(text):
            if isinstance(event, (NodeEvent, CollectionEndEvent)):
                yield event
    except (ValueError, OverflowError) as error:  # its scanner on escapes such as "\UFFFFFFFF"
        raise MarkedYAMLError(problem=str(error), problem_mark=reader.reader.get_mark()) from error


def _document(events: Iterator[Event]) -> Any:
    first = next(events, None)
    tree = None if first is None else _value(first, events, 0)
    if (another := next(events, None)) is not None:
        raise _refusal(another, "expected a single document, but found another document")
    return tree


def _value(event: Event, events: Iterator[Event], depth: int) -> Any:
    """The value that begins with ``event``; takes what belongs to it from ``events``."""
    if depth > DEEPEST:
        raise _refusal(event, f"nested deeper than {DEEPEST}")
    if isinstance(event, ScalarEvent):
        return _scalar(event)
    if not isinstance(event, (MappingStartEvent, SequenceStartEvent)):
        raise _refusal(event, "aliases (*name) are not read: write the value out")
    if event.tag is not None:
        raise _refusal(event, f"the tag {event.tag} is not read")
    if isinstance(event, MappingStartEvent):
        return _mapping(events, depth)
    items = []
    while not isinstance(item := next(events), CollectionEndEvent):
        items.append(_value(item, events, depth + 1))
    return items


def _mapping(events: Iterator[Event], depth: int) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    while not isinstance(event := next(events), CollectionEndEvent):
        key = _scalar(event) if isinstance(event, ScalarEvent) else None
        if not isinstance(key, str):
            raise _refusal(event, "a key must be a name; put quotes around it if it is one")
        if key in tree:
            raise _refusal(event, f"the key {key!r} is there twice")
        tree[key] = _value(next(events), events, depth + 1)
    return tree


def _scalar(event: ScalarEvent) -> Any:
    if event.tag is not None:
        raise _refusal(event, f"the tag {event.tag} is not read")
    text = event.value
    kind = str(_RULES.resolve(ScalarNode, text, event.implicit)).removeprefix(TAG)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind in ("int", "float"):
        return _number(event, kind)
    if kind == "timestamp":
        raise _refusal(event, f"the date {text} is not read: put quotes around it if it is text")
    if kind == "merge":
        raise _refusal(event, "merge keys (<<) and aliases are not read: write the value out")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _refusal(event, "text holds a NUL or half a surrogate pair")
    return text


def _number(event: ScalarEvent, kind: str) -> int | float:
    """An integer of 64 bits or a finite number; digits may be grouped by underscores."""
    text = event.value.replace("_", "")
    if kind == "float":
        number = math.inf if text[-1:].isalpha() else float(text)  # .inf and .nan
        if math.isfinite(number):
            return number
    else:
        prefixed = text.lstrip("+-")[:2] in ("0b", "0o", "0x")
        with contextlib.suppress(ValueError):  # nothing but underscores, or more digits than Python reads
            if abs(whole := int(text, 0 if prefixed else 10)) < LARGEST:
                return whole
    raise _refusal(event, f"the number {event.value[:30]} is out of range")


def _refusal(event: Event, problem: str) -> MarkedYAMLError:
    return MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
