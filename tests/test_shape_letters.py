"""Names that end in a shape use the letters of one legend, and the legend has no letter that nobody uses."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from stablemoe_ds.routing import routes
from tests.test_imports import MODULES, ROOT

SHAPED = re.compile(r"[a-z]\w*_([A-Z]+)")
LEGEND = re.findall(r"^([A-Z])  (\S.*)$", str(routes.__doc__), re.MULTILINE)


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a file gives or uses, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                yield name, node.lineno


def shapes() -> Iterator[tuple[str, str]]:
    """(letters, place) of every shaped name in the package."""
    for path in MODULES:
        for name, line in names(ast.parse(path.read_text())):
            if found := SHAPED.fullmatch(name):
                yield found[1], f"{path.relative_to(ROOT)}:{line}: {name}"


def test_every_letter_is_explained_once() -> None:
    letters = [letter for letter, _ in LEGEND]
    assert letters == sorted(set(letters))
    assert [place for shape, place in shapes() if not set(shape) <= set(letters)] == []
    assert {letter for shape, _ in shapes() for letter in shape} == set(letters)


def test_no_two_letters_mean_the_same() -> None:
    meanings = [meaning for _, meaning in LEGEND]
    assert len(set(meanings)) == len(meanings) > 15


def test_the_scan_finds_shapes_and_leaves_other_names_alone() -> None:
    text = "def f(x_TD, plain, w_9): self.y_BS = torch.LONG_NAME; z_Q = g(k_V=x_TD)"
    found = [name for name, _ in names(ast.parse(text)) if SHAPED.fullmatch(name)]
    assert sorted(found) == ["k_V", "x_TD", "x_TD", "y_BS", "z_Q"]
