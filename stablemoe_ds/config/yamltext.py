"""YAML text to plain values and back: the small, unambiguous part of YAML that a run needs.

PyYAML follows YAML 1.1, where ``6e-4`` is text, ``no`` is false, ``1:30`` is 90, ``010`` is 8, a key may come twice and
a few lines of aliases unfold to gigabytes. Here only ``true``/``false``, ``null``/``~``, decimal numbers and text are
told apart, and aliases, custom tags and repeated keys are refused.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from stablemoe_ds.config.messages import cut
from stablemoe_ds.errors import UserError

TAG = "tag:yaml.org,2002:"
DEEPEST = 40
LARGEST = 2**63
FLOAT = re.compile(r"[-+]?((\.[0-9]+|[0-9][0-9_]*\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)$")


class _Resolver(BaseResolver):
    """Which tag a scalar without quotes has."""


_Resolver.add_implicit_resolver(TAG + "null", re.compile(r"(~|null|)$"), ["~", "n", ""])
_Resolver.add_implicit_resolver(TAG + "bool", re.compile(r"(true|false)$"), ["t", "f"])
_Resolver.add_implicit_resolver(TAG + "int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Resolver.add_implicit_resolver(TAG + "float", FLOAT, list("-+.0123456789"))


class _Reader(Reader, Scanner, Parser, Composer, _Resolver):
    """PyYAML up to the node graph; :func:`_plain` does the rest."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read: write the value out", problem_mark=mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or this reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(TAG + "float", FLOAT, list("-+.0123456789"))


def parse(text: str, where: str) -> Any:
    """Read one YAML document; None if it is empty.

    where: what to call the text in an error. Raises UserError with line and column if it cannot be read.
    """
    try:
        node = _Reader(text).get_single_node()
        return None if node is None else _plain(node, 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        reason = ", ".join(filter(None, (error.context, error.problem)))
    except ReaderError as error:
        place, reason = where, f"character {error.character!r} at {error.position} is not allowed"
    except RecursionError:
        place, reason = where, f"nested deeper than {DEEPEST}"
    except (ValueError, OverflowError) as error:  # PyYAML on escapes such as "\UFFFFFFFF"
        place, reason = where, str(error)
    raise UserError(f"{place}: this is not YAML that can be read: {cut(reason, 200)}")


def dump(tree: Any) -> str:
    """The YAML text that :func:`parse` reads back as ``tree``; keys keep their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=110)


def _refuse(node: Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _plain(node: Node, depth: int) -> Any:
    if depth > DEEPEST:
        raise _refuse(node, f"nested deeper than {DEEPEST}")
    if isinstance(node, MappingNode) and node.tag == TAG + "map":
        return _mapping(node, depth)
    if isinstance(node, SequenceNode) and node.tag == TAG + "seq":
        return [_plain(item, depth + 1) for item in node.value]
    if isinstance(node, ScalarNode):
        return _scalar(node)
    raise _refuse(node, f"the tag {node.tag} is not read")


def _mapping(node: MappingNode, depth: int) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key_node, value in node.value:
        key = _scalar(key_node) if isinstance(key_node, ScalarNode) else None
        if not isinstance(key, str):
            raise _refuse(key_node, "a key must be a name; put quotes around it if it is one")
        if key in tree:
            raise _refuse(key_node, f"the key {key!r} is there twice")
        tree[key] = _plain(value, depth + 1)
    return tree


def _scalar(node: ScalarNode) -> Any:
    kind, text = node.tag.removeprefix(TAG), node.value
    if kind == "str":
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise _refuse(node, "text holds a NUL or half a surrogate pair")
        return text
    if kind == "null":
        return None
    if kind == "bool" and text in ("true", "false"):
        return text == "true"
    digits = text.replace("_", "")
    if kind == "int" and len(digits) < 25 and abs(number := int(digits)) < LARGEST:
        return number
    if kind == "float" and math.isfinite(real := float(digits)):
        return real
    if kind in ("int", "float"):
        raise _refuse(node, f"the number {text[:30]} is out of range")
    raise _refuse(node, f"the tag {node.tag} is not read")
