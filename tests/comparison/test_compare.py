"""``stablemoe compare`` from end to end, in processes of its own as a person would start it."""

from __future__ import annotations

import csv
import math
import shutil
import signal
import statistics
import time
from pathlib import Path

import pytest

from stablemoe_ds.comparison.suite import load_suite
from stablemoe_ds.comparison.suite_state import state_of
from stablemoe_ds.config.load import load_run
from stablemoe_ds.errors import UserError
from tests.comparison.suites import PATIENCE, SEEDS, VARIANTS, TinySuite, compare, started, tiny_suite
from tests.training.runs import STEPS, TinyData

pytestmark = [pytest.mark.slow, pytest.mark.timeout(PATIENCE + 100)]


def table(suite: TinySuite) -> dict[tuple[str, int], dict[str, str]]:
    with (suite.output / "table.csv").open() as file:
        return {(row["router"], int(row["seed"])): row for row in csv.DictReader(file)}


def copied(suite: TinySuite, data: TinyData, folder: Path) -> TinySuite:
    """A suite with the same runs, to be changed."""
    copy = tiny_suite(data, folder)
    shutil.copytree(suite.output, copy.output)
    return copy


def set_back(suite: TinySuite, label: str, seed: int, step: int) -> None:
    """Leave a run as if it had been killed after the checkpoint of ``step``."""
    folder = suite.output / label / f"seed-{seed}"
    (folder / "checkpoints" / "latest").write_text(f"step-{step:06d}")
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:06d}")
    (folder / "report.json").unlink()


def test_every_run_is_finished_and_leaves_what_it_was(compared: TinySuite):
    for one in load_suite(compared.file).runs:
        assert state_of(one) == "finished"
        assert load_run(one.sibling("yaml")) == one.run
        assert f"step 12: test perplexity {compared.lines(one.label, one.seed, 'test')[-1]['perplexity']:.3f}" in (
            one.sibling("log").read_text()
        )


def test_table_says_what_the_runs_have_measured(compared: TinySuite):
    found = table(compared)
    assert list(found) == [(label, seed) for seed in SEEDS for label in VARIANTS]
    for (label, seed), row in found.items():
        assert float(row["valid_ppl"]) == pytest.approx(compared.lines(label, seed, "valid")[-1]["perplexity"])
        assert float(row["test_ppl"]) == pytest.approx(compared.lines(label, seed, "test")[-1]["perplexity"])
        assert float(row["tokens"]) == STEPS * 128
        train = compared.lines(label, seed, "train")
        assert float(row["seconds"]) == pytest.approx(sum(128 / line["tokens_per_second"] for line in train))
        assert float(row["probe_seconds"]) > 0
        assert float(row["churn"]) == pytest.approx(compared.lines(label, seed, "probe")[-1]["churn"])
        assert 0 <= float(row["exceeds_80"]) <= float(row["exceeds_20"]) <= 1
    assert float(found["ours", 1]["exceeds_50"]) == 0, "nothing moves after the switch, which is half way"
    assert found["ours", 1]["total_parameters"] > found["switch", 1]["total_parameters"], "a distilled router more"
    assert [(found[label, 1]["table"], found[label, 1]["gate"]) for label in VARIANTS] == [
        ("distilled", "sigmoid"),
        ("none", "softmax"),
    ]


def test_markdown_says_mean_deviation_and_interval(compared: TinySuite):
    text, ppl = (compared.output / "table.md").read_text(), compared.perplexities()
    ours, theirs = ([ppl[label, seed] for seed in SEEDS] for label in ("ours", "switch"))
    assert f"{statistics.fmean(ours):.2f} ± {statistics.stdev(ours):.2f} | reference" in text
    pairs = [b - a for a, b in zip(ours, theirs, strict=True)]
    mean, half = statistics.fmean(pairs), 12.7062 * statistics.stdev(pairs) / math.sqrt(2)
    assert f"| {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] |" in text
    for part in ("# tiny", f"stablemoe compare {compared.file}", "11,", "seeds: 1, 2; 4 of 4 runs are finished"):
        assert part in text
    assert text.split("\n\n", 2)[2] in (compared.output / "said.txt").read_text()


def test_a_seed_gives_all_variants_the_same_start(compared: TinySuite):
    """The MoE layer adds nothing at first, so the first loss is that of the same tokens in the same backbone."""
    first = {(label, seed): compared.lines(label, seed, "train")[0]["loss"] for label in VARIANTS for seed in SEEDS}
    assert first["ours", 1] == first["switch", 1]
    assert first["ours", 2] == first["switch", 2]
    assert first["ours", 1] != first["ours", 2]


def test_a_finished_run_is_left_a_broken_one_is_told_and_a_killed_one_continues_after_it(
    compared: TinySuite, data: TinyData, tmp_path: Path
):
    suite = copied(compared, data, tmp_path)
    tiny_suite(data, tmp_path, seeds=[2], variants={"broken": ["data.train=nowhere/text"], **VARIANTS})
    set_back(suite, "switch", 2, step=6)
    others = {path: path.read_bytes() for path in suite.output.glob("*/seed-*.log") if "switch/seed-2" not in str(path)}
    answer = compare(suite.file)
    assert answer.code == 1, answer.out + answer.err
    assert "1 of 3 runs are finished already" in answer.out
    (told,) = [line for line in answer.out.splitlines() if "FAILED" in line]
    assert told.startswith("[1/3] broken, seed 2: FAILED after ")
    assert "with exit code 2: stablemoe: error: " in told
    assert "nowhere/text" in told
    assert "not finished: broken, seed 2" in answer.out
    assert "switch, seed 2: begun" in answer.out
    assert "continuing after update 6" in (suite.output / "switch" / "seed-2.log").read_text()
    assert all(path.read_bytes() == before for path, before in others.items())
    assert suite.perplexities() == compared.perplexities(), "the same to the last bit"
    assert set(table(suite)) == {("ours", 2), ("switch", 2)}


def test_a_run_of_other_settings_is_not_taken_for_its_own(compared: TinySuite, data: TinyData, tmp_path: Path):
    suite = copied(compared, data, tmp_path)
    tiny_suite(data, tmp_path, overrides=["optimizer.lr=0.005"])
    with pytest.raises(UserError, match=r"holds a run with optimizer.lr 0.01, the suite has 0.005: move"):
        state_of(load_suite(suite.file).runs[0])
    answer = compare(suite.file)
    assert (answer.code, answer.err.count("\n")) == (2, 1)


def test_report_alone_draws_anew(compared: TinySuite, data: TinyData, tmp_path: Path):
    suite = copied(compared, data, tmp_path)
    set_back(suite, "switch", 2, step=6)
    made = [suite.output / name for name in ("table.csv", "table.md", "perplexity_tokens.png", "fluctuation.png")]
    for path in made:
        path.unlink()
    answer = compare(suite.file, "--report")
    assert answer.code == 0, answer.err
    assert all(path.exists() for path in made)
    assert set(table(suite)) == {("ours", 1), ("switch", 1), ("ours", 2)}
    assert "3 of 4 runs are finished" in (suite.output / "table.md").read_text()
    assert not (suite.output / "switch" / "seed-2" / "report.json").exists(), "nothing was trained"


def test_ctrl_c_saves_and_stops(data: TinyData, tmp_path: Path):
    long = ["schedule.steps=100000", "checkpoint.every=0"]
    suite = tiny_suite(data, tmp_path, overrides=long, seeds=[1])
    metrics = suite.output / "ours" / "seed-1" / "metrics.jsonl"
    until = time.monotonic() + PATIENCE / 4
    with started(suite.file) as process:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.1)
        assert "skipped, another process is training it" in compare(suite.file, "--only", "ours").out
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE / 4)
    assert process.returncode == 1, err
    assert "asked to stop: 1 run(s) save first" in out
    assert "ours, seed 1: stopped after" in out
    assert "switch, seed 1" not in out.split("not finished")[0], "nothing begins after that"
    first = load_suite(suite.file).runs[0]
    assert state_of(first) == "begun"
    assert "asked to stop: saved at step" in first.sibling("log").read_text()
