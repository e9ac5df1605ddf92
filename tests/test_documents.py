"""What the documents name exists: files, links, tests, and the commands they tell people to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from stablemoe_ds.cli import build_parser
from tests.test_imports import HEIGHT

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = [path.parent.name for path in sorted((ROOT / "stablemoe_ds").glob("*/__init__.py"))]


def name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    assert [t for t in targets if "://" not in t and not (document.parent / t).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_named_files_and_tests_exist(document: Path) -> None:
    missing = []
    for file, test in re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", document.read_text()):
        places = [ROOT / file, ROOT / "stablemoe_ds" / file]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            # A file may be named alone where its room has just been named.
            found = next(iter((ROOT / "stablemoe_ds").glob(f"*/{file}")), None)
        if found is None or (test and f"def {test}(" not in found.read_text()):
            missing.append(f"{file}::{test}")
    assert missing == []


def test_architecture_names_every_room_with_its_height() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert [room for room in ROOMS if f"| `{room}/` | {HEIGHT[room]} |" not in text] == []


def commands(document: Path) -> list[list[str]]:
    """Arguments of every ``stablemoe`` in a document's indented blocks, under whatever launcher."""
    lines = re.sub(r"\\\n\s*", "", document.read_text()).splitlines()
    typed = [shlex.split(line, comments=True) for line in lines if re.match(r" {4}.*\bstablemoe(_ds)? [a-z]", line)]
    starts = [next(i for i, word in enumerate(words) if word in ("stablemoe", "stablemoe_ds")) for words in typed]
    return [words[start + 1 :] for words, start in zip(typed, starts, strict=True)]


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if commands(path)], ids=name)
def test_commands_can_be_typed(document: Path) -> None:
    for arguments in commands(document):
        build_parser().parse_args(arguments)


def test_readme_shows_every_command() -> None:
    shown = {arguments[0] for arguments in commands(ROOT / "README.md")} | {"demo"}
    (subparsers,) = (action for action in build_parser()._actions if action.dest == "command")
    assert shown == set(subparsers.choices or ())
