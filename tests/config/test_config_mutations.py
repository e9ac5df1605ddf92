"""Thousands of damaged configurations: each is a run or one UserError, nothing else, and in reasonable time."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stablemoe_ds.comparison.suite import SuiteConfig, load_suite
from stablemoe_ds.config.batch_plan import batch_plan
from stablemoe_ds.config.cost_report import render, report
from stablemoe_ds.config.deepspeed_config import deepspeed_config
from stablemoe_ds.config.load import dump_run, load_run, load_section
from stablemoe_ds.config.messages import known_keys
from stablemoe_ds.config.rules import check
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError
from stablemoe_ds.launch.cluster import load_cluster
from stablemoe_ds.launch.job import Facts
from stablemoe_ds.launch.make_jobs import make_jobs

KEYS = known_keys()
ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "ds_configs").rglob("*.yaml"))
SUITES = [path for path in SHIPPED if "variants:" in path.read_text()]
SOURCES = [path for path in SHIPPED if path not in SUITES]
CLUSTERS = sorted((ROOT / "launch").glob("*.yaml"))
START = re.compile(r"\S+\.yaml:|hostfile |override |world size: |[a-z_]+(\.\w+)*: |\.\.\. and \d+ more")
"""What a line of a complaint begins with: a file, a key, or what was laid over them."""
NUMBERS = "0 1 -1 2 3 7 8 64 9223372036854775807 9223372036854775808 1e308 -0.5 0.5 1e-300 6e-4 .nan .inf"
WORDS = "null true no text 'é' dense stablemoe rope learned swiglu replace transformer fp16 bf16"
SHAPES = ["", "[]", "[1]", "[1, 2, 2]", "[x, [y]]", "{}", "{path: a}", "{a: {b: 1}}", "- 1", "? a", "|", "%", "@", "\t"]
TRAPS = ["*x", "&x 1", "!!int 5", "!!binary aGk=", "!!set {a}", "[", "}", '"\\0"', '"\\ud800"']
VALUES = [*NUMBERS.split(), *WORDS.split(), *SHAPES, *TRAPS]
FACTS = Facts(stamp="stamp", python="python", user="1:1", port=29500)
LETTERS = "abz019_.,:;-#'\"[]{}&*!|>%@`\\\n\t\r \0\x85\u2028\ufeff\U0001f600é~=+"


def outcome(act: Callable[[], object]) -> str:
    """Whether input was taken; anything but a UserError of lines that can be read is the caller's failure."""
    try:
        act()
    except UserError as error:
        lines = str(error).split("\n")
        assert all(START.match(line) for line in lines), lines
        assert all(line.isprintable() and len(line) < 800 for line in lines), lines
        return "refused"
    return "run"


def whole_run(path: Path, overrides: list[str], world_size: int | None) -> None:
    """All that is done with a run before anything heavy is loaded."""
    run = load_run(path, overrides)
    dump_run(run)
    check(run, world_size)
    facts = report(run, world_size)
    assert render(facts)
    deepspeed_config(run, batch_plan(run, facts["world_size"]))


def whole_cluster(run: RunConfig, path: Path) -> None:
    """All that is done with a cluster before a job is written."""
    jobs = make_jobs([run], load_cluster(path), FACTS)
    assert all(job.as_shell() for job in jobs)


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
    outcomes = []
    for _ in range(400):
        overrides, size = [override(draw) for _ in range(draw.randint(1, 2))], draw.choice([None, 1, 2, 6])
        outcomes.append(outcome(lambda: whole_run(small, overrides, size)))  # noqa: B023
    assert 5 < outcomes.count("run") < 395, "the mutations should leave some runs whole and break others"


def damage_and_try(source: Path, path: Path, count: int, act: Callable[[], object]) -> None:
    """Try damaged copies of ``source``, each written to ``path``."""
    draw = random.Random(source.stem)
    text = "\n".join(line for line in source.read_text().splitlines() if line and not line.startswith("#"))
    outcomes = set()
    for _ in range(count):
        path.write_text(damaged(draw, text), encoding="utf-8")
        outcomes.add(outcome(act))
    assert outcomes == {"run", "refused"}, "the mutations should leave some whole and break others"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_damaged_runs(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    given = [] if "vocab_size" in source.read_text() else ["model.vocab_size=8192"]  # else the tokenizer is needed
    damage_and_try(source, path, 120, lambda: whole_run(path, given, None))


@pytest.mark.parametrize("source", CLUSTERS, ids=lambda path: path.stem)
def test_damaged_clusters(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # a hostfile is named relative to it
    run, path = load_run(ROOT / "ds_configs" / "paper-base.yaml", ["parallel.expert=1"]), tmp_path / "cluster.yaml"
    damage_and_try(source, path, 60, lambda: whole_cluster(run, path))


@pytest.mark.parametrize("source", SUITES, ids=lambda path: path.stem)
def test_damaged_suites(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    damage_and_try(source, path, 60, lambda: load_section(SuiteConfig, path, (), "'name:' and 'variants:'"))


def test_damaged_suite_with_all_its_runs(tmp_path: Path) -> None:
    source = ROOT / "ds_configs" / "suites" / "stages.yaml"
    shutil.copy(source.with_name("enwiki-small.yaml"), tmp_path)
    path = tmp_path / "suite.yaml"
    damage_and_try(source, path, 30, lambda: load_suite(path))
