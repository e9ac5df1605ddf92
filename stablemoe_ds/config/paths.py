"""The one place where a path written by a user becomes one that can be opened."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

WRITTEN = {"paths": "written"}
"""Context for validating what a user writes. What a checkpoint has recorded is taken as it is."""

_VARIABLE = re.compile(r"\$(\w+|\{)")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_TURNING = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def expanded(path: str) -> str:
    """The path with ``~`` and ``~user`` at its start replaced by that home directory.

    A relative path stays one: it starts in the directory a command is given in. Raises ValueError for what nobody
    would mean to write: nothing, blanks at an end, control characters, a user that does not exist, a variable of the
    shell, which only a shell replaces, or a URL.
    """
    if _URL.match(path):
        raise ValueError("a URL is not a path: download it first")
    if found := _VARIABLE.search(path):
        raise ValueError(f"{found[0].rstrip('{')}... is replaced only by a shell: write the path out, or use ~")
    return _home(_plain(path))


def plain_name(name: str) -> str:
    """A name that a directory is called by: as :func:`expanded`, but ``~`` and variables have no meaning in it."""
    if name.startswith("~") or _VARIABLE.search(name):
        raise ValueError("it names a directory, so it cannot begin with ~ or contain a variable")
    return _plain(name)


def _plain(path: str) -> str:
    if not path.strip():
        raise ValueError("it is empty; expected a path, or null")
    if path != path.strip():
        raise ValueError(f"a space at the start or end; nearest that works: {path.strip()}")
    odd = next((c for c in path if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or _TURNING.match(c)), None)
    if odd is not None:
        raise ValueError(f"the character U+{ord(odd):04X} is invisible and not allowed in a path: remove it")
    return path


def _home(path: str) -> str:
    if not path.startswith("~"):
        return path
    home = os.path.expanduser(path)
    if home.startswith("~"):
        user = path.partition("/")[0]
        reason = f"there is no user '{user[1:]}'" if user != "~" else "nothing says where your home is"
        raise ValueError(f"{reason}; write it out, or ./{user} for a file of that name")
    return home


def expanded_within(tree: Any) -> Any:
    """A tree of settings whose meaning another library knows: every text that begins with ``~`` is taken for a path."""
    if isinstance(tree, dict):
        return {key: expanded_within(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [expanded_within(value) for value in tree]
    return expanded(tree) if isinstance(tree, str) and tree.startswith("~") else tree


def if_written(check: Callable[[Any], Any]) -> AfterValidator:
    """Apply ``check`` to what a user writes, and not to what a checkpoint has recorded."""

    def validator(value: Any, info: ValidationInfo) -> Any:
        return check(value) if info.context == WRITTEN else value

    return AfterValidator(validator)


PathText = Annotated[str, if_written(expanded)]
"""A path in a section of a YAML file."""
NameText = Annotated[str, if_written(plain_name)]
"""A name in a section of a YAML file that a directory is called by."""
