"""Suites: what is refused and how, what a run becomes, and the suites that are shipped."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from stablemoe_ds.comparison.suite import load_suite
from stablemoe_ds.config.difference import differences
from stablemoe_ds.config.load import load_run
from stablemoe_ds.config.resolved import settled
from stablemoe_ds.config.rules import check, with_vocabulary
from stablemoe_ds.errors import UserError
from tests.training.runs import TinyData, run_file, small_run

SHIPPED = [
    path
    for path in sorted((Path(__file__).parents[2] / "ds_configs" / "suites").glob("*.yaml"))
    if "variants" in yaml.safe_load(path.read_text())
]
DATA = TinyData(Path("text"), "tokenizer.model", "train", "valid")


def suite_file(folder: Path, **changes: object) -> Path:
    run = small_run(DATA, folder / "unused", logging={"every": 5})
    run_file(run, folder / "base.yaml")
    suite = {
        "name": "two",
        "run": "base.yaml",
        "overrides": ["schedule.steps=20"],
        "variants": {"ours": [], "theirs": ["moe.router=switch", "schedule.steps=30"]},
        "seeds": [3, 1],
        "reference": "ours",
        **changes,
    }
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in suite.items() if value is not None}, sort_keys=False))
    return path


def test_variants_are_laid_over_overrides_over_the_run(tmp_path: Path):
    suite = load_suite(suite_file(tmp_path))
    assert [str(run) for run in suite.runs] == ["ours, seed 3", "theirs, seed 3", "ours, seed 1", "theirs, seed 1"]
    ours, theirs = suite.runs[:2]
    assert (ours.run.moe.router, ours.run.schedule.steps, ours.run.logging.every) == ("stablemoe", 20, 5)
    assert (theirs.run.moe.router, theirs.run.schedule.steps, theirs.run.logging.every) == ("switch", 30, 5)


def test_runs_have_a_directory_a_name_and_a_seed_of_their_own(tmp_path: Path):
    suite = load_suite(suite_file(tmp_path))
    run = suite.runs[1].run
    assert (run.directory, run.name, run.seed) == ("runs/compare/two/theirs/seed-3", "theirs-3", 3)
    assert suite.runs[1].sibling("log") == Path("runs/compare/two/theirs/seed-3.log")
    elsewhere = load_suite(suite_file(tmp_path, output="out/here"))
    assert elsewhere.runs[0].run.directory == "out/here/ours/seed-3"


def test_the_command_trains_the_same_run(tmp_path: Path):
    for one in load_suite(suite_file(tmp_path, output="with space & more")).runs:
        words = shlex.split(one.command)
        assert words[1:4] == ["-m", "stablemoe_ds", "train"]
        assert settled(load_run(words[4], words[5:])) == one.run


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reference": "other"}, "reference 'other' is no variant: expected one of ours, theirs"),
        ({"seeds": [1, 2, 1]}, "seeds repeat; nearest that works: [1, 2]"),
        ({"seeds": []}, "seeds: got []"),
        ({"seed": [1]}, "seed: unknown key; did you mean seeds?"),
        ({"run": None}, "run: missing: YAML file of the run"),
        ({"run": "nowhere.yaml"}, "variant ours: "),
        ({"variants": {"ours": [], "a b": []}}, "a b"),
        ({"variants": {"ours": [], "../up": []}}, "../up"),
        ({"variants": {"ours": ["moe.ruter=base"]}}, "variant ours: override moe.ruter=base: moe.ruter: unknown key"),
        ({"variants": {"ours": ["model.heads=6"]}}, "variant ours: model.heads: got 6: expected a divisor"),
        ({"overrides": ["data.valid=[]"]}, "variant ours: data.valid: got []"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path: Path, changes: dict[str, object], told: str):
    path = suite_file(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        load_suite(path)
    assert str(error.value).startswith(str(path))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_only_names_variants(tmp_path: Path):
    suite = load_suite(suite_file(tmp_path))
    assert [str(run) for run in suite.only(["theirs"])] == ["theirs, seed 3", "theirs, seed 1"]
    with pytest.raises(UserError, match=r"--only thiers: .* expected one of ours, theirs"):
        suite.only(["thiers"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_suite_can_run(path: Path):
    suite = load_suite(path)
    for one in suite.runs:
        check(with_vocabulary(one.run, one.run.model.vocab_size or 4096), 8 if path.stem.endswith("-paper") else 1)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_variants_are_tuned_alike(path: Path):
    """Same data, learning rates, schedule and backbone: variants differ in their MoE layers and when they freeze."""
    first, *others = load_suite(path).runs
    for other in others:
        keys = {key for key, _, _ in differences(first.run, other.run)} - {"seed", "parallel.expert"}
        assert {key.split(".")[0] for key in keys} <= {"moe", "stages"}
        assert "moe.distilled.lr_scale" not in keys


def test_six_tables_and_figures_in_three_sizes():
    topics = ("routers", "position", "stages", "distilled", "experts", "sublayers")
    assert {path.stem for path in SHIPPED} >= {f"{topic}{size}" for topic in topics for size in ("", "-gpu", "-paper")}
