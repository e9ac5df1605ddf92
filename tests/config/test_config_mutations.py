"""Thousands of damaged configurations: each is a run or one UserError, nothing else, and in reasonable time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from stablemoe_ds.config.batch import batch_plan
from stablemoe_ds.config.complaints import known_keys
from stablemoe_ds.config.deepspeed import deepspeed_config
from stablemoe_ds.config.load import dump_run, load_run
from stablemoe_ds.config.report import render, report
from stablemoe_ds.config.rules import check
from stablemoe_ds.errors import UserError

KEYS = known_keys()
SOURCES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.yaml"))
NUMBERS = "0 1 -1 2 3 7 8 64 9223372036854775807 9223372036854775808 1e308 -0.5 0.5 1e-300 6e-4 .nan .inf"
WORDS = "null true no text 'é' dense stablemoe rope learned swiglu replace transformer fp16 bf16"
SHAPES = ["", "[]", "[1]", "[1, 2, 2]", "[x, [y]]", "{}", "{path: a}", "{a: {b: 1}}", "- 1", "? a", "|", "%", "@", "\t"]
TRAPS = ["*x", "&x 1", "!!int 5", "!!binary aGk=", "!!set {a}", "[", "}", '"\\0"', '"\\ud800"']
VALUES = [*NUMBERS.split(), *WORDS.split(), *SHAPES, *TRAPS]
LETTERS = "abz019_.,:;-#'\"[]{}&*!|>%@`\\\n\t\r \0\x85\u2028\ufeff\U0001f600é~=+"


def outcome(path: Path, overrides: list[str], world_size: int | None) -> str:
    """How far a run comes; anything but a UserError on the way is the caller's failure."""
    try:
        run = load_run(path, overrides)
        dump_run(run)
        check(run, world_size)
        facts = report(run, world_size)
        assert render(facts)
        deepspeed_config(run, batch_plan(run, facts["world_size"]))
    except UserError as error:
        message = str(error)
        assert message
        assert message.encode(), "must be printable"
        assert all(len(line) < 800 for line in message.splitlines())
        return "refused"
    return "run"


def override(draw: random.Random) -> str:
    key, value = draw.choice(KEYS), draw.choice(VALUES)
    if draw.random() < 0.1:
        cut = draw.randrange(len(key))
        key = key[:cut] + draw.choice(LETTERS) + key[cut + 1 :]
    if draw.random() < 0.1:
        value += draw.choice(LETTERS)
    return f"{key}={value}"


def damaged(draw: random.Random, text: str) -> str:
    """A letter put in or changed, a line repeated, lost, moved or given another value; up to four times."""
    lines = text.splitlines()
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(lines))
        line, kind = lines[at], draw.randrange(5)
        if kind == 0:
            spot = draw.randrange(len(line) + 1)
            lines[at] = line[:spot] + draw.choice(LETTERS) + line[spot + draw.randrange(2) :]
        elif kind == 1:
            lines.insert(at, draw.choice(lines))
        elif kind == 2 and len(lines) > 1:
            del lines[at]
        elif kind == 3:
            lines[at] = line.partition(":")[0] + ": " + draw.choice(VALUES)
        else:
            lines[at] = " " * draw.randrange(4) + line.strip()
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(5))
def test_damaged_overrides(seed: int, small: Path) -> None:
    draw = random.Random(seed)
    outcomes = [
        outcome(small, [override(draw) for _ in range(draw.randint(1, 2))], draw.choice([None, 1, 2, 6]))
        for _ in range(400)
    ]
    assert 5 < outcomes.count("run") < 395, "the mutations should leave some runs whole and break others"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_damaged_files(source: Path, tmp_path: Path) -> None:
    draw, path = random.Random(source.stem), tmp_path / "run.yaml"
    text = "\n".join(line for line in source.read_text().splitlines() if line and not line.startswith("#"))
    outcomes = []
    for _ in range(200):
        path.write_text(damaged(draw, text), encoding="utf-8")
        outcomes.append(outcome(path, [], draw.choice([None, 8])))
    assert 5 < outcomes.count("run") < 195, "the mutations should leave some runs whole and break others"
