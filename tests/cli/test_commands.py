"""What the commands answer about a run that these tests have trained."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.run_directory.checkpoint_files import read_manifest, write_manifest
from tests.training.runs import STEPS, SWITCH, VOCAB, TinyData, checkpoint_of, command, command_here, history, run_file


def test_evaluation(finished: RunConfig) -> None:
    facts = command("eval", finished.directory, "--json").json
    (*_, logged) = history(finished, "valid")
    assert (facts["step"], facts["stage"]) == (STEPS, 2)
    assert facts["perplexity"] == pytest.approx(logged["perplexity"], rel=1e-6)
    assert facts["word_perplexity"] == pytest.approx(logged["word_perplexity"], rel=1e-6)
    assert facts["tokens"] == logged["tokens"]
    assert facts["perplexity_distilled"] is None
    assert facts["agreement"] is None


@pytest.mark.distributed
def test_evaluation_by_two_processes(finished: RunConfig) -> None:
    one, two = (command("eval", finished.directory, "--json", ranks=ranks).json for ranks in (1, 2))
    assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-6)
    for name in ("perplexity", "word_perplexity"):
        assert two.pop(name) == pytest.approx(one.pop(name), rel=1e-5)
    assert two == one


def test_evaluation_in_stage_1_tells_both(finished: RunConfig) -> None:
    path = str(checkpoint_of(finished, 3))
    facts = command("eval", path, "--json").json
    assert (facts["step"], facts["stage"]) == (3, 1)
    assert facts["perplexity"] != facts["perplexity_distilled"]
    assert facts["perplexity_distilled"] == pytest.approx(facts["perplexity"], rel=0.2)
    assert 0 < facts["agreement"] < 1
    said = command("eval", path).out
    assert f"perplexity      {facts['perplexity']:.4f} a token" in said
    assert f"distilled       {facts['perplexity_distilled']:.4f} a token" in said


def test_evaluation_of_a_named_corpus(finished: RunConfig, data: TinyData) -> None:
    facts = command("eval", finished.directory, "--data", data.train, "--json").json
    assert facts["corpus"] == [data.train]
    assert facts["tokens"] > command("eval", finished.directory, "--json").json["tokens"]


def test_generation(finished: RunConfig) -> None:
    words = ("generate", finished.directory, "--prompt", "def ", "--prompt", "text", "--tokens", "12")
    greedy, again, uncached = (command(*words, "--json", *more).json for more in ((), (), ("--no-cache",)))
    assert [entry["prompt"] for entry in greedy] == ["def ", "text"]
    assert any(entry["continuation"] for entry in greedy)
    assert greedy == again == uncached
    plain = command(*words).out
    assert plain.startswith("def " + greedy[0]["continuation"])


def test_generation_with_a_part_of_the_experts_in_memory(finished: RunConfig) -> None:
    words = ("generate", finished.directory, "--prompt", "def ", "--prompt", "text", "--tokens", "12", "--json")
    every, half = (command(*words, *more) for more in ((), ("--resident-experts", "0.5")))
    assert half.json == every.json
    assert re.search(r"2 of 4 experts in memory \(.* MB\); of \d+ that had tokens \d+ were fetched", half.err)
    assert "experts in memory" not in every.err


def test_drawn_generation_follows_the_seed(finished: RunConfig) -> None:
    words = ("generate", finished.directory, "--prompt", "def ", "--tokens", "20", "--temperature", "1", "--json")
    one, same, other = (command(*words, "--seed", seed).json for seed in ("1", "1", "2"))
    assert one == same
    assert one != other


@pytest.mark.distributed
def test_two_processes_that_share_the_experts_draw_what_one_draws(finished: RunConfig, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint_of(finished, STEPS), tmp_path / "shared"))
    manifest = read_manifest(copy)
    manifest["run"]["parallel"]["expert"] = 2
    write_manifest(copy, manifest)
    words = ("generate", str(copy), "--prompt", "def ", "--tokens", "16", "--temperature", "1", "--seed", "3", "--json")
    (alone,) = command(*words).json
    for ranks in (1, 2):
        _, beside = command(*words, "--prompt", "class Node", ranks=ranks).json[::-1]
        assert beside == alone


def test_routing_report(finished: RunConfig, tmp_path: Path) -> None:
    picture = tmp_path / "report.png"
    report = command_here("routing", "report", finished.directory, "--json", "--png", str(picture)).json
    assert report == json.loads((Path(finished.directory) / "report.json").read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = command_here("routing", "report", finished.directory).out
    assert f"{report['valid_ppl']['final']:,.2f}" in said


def test_bands_add_up_to_the_loss_of_eval(finished: RunConfig) -> None:
    whole = command("eval", finished.directory, "--json").json
    asked = ("routing", "bands", finished.directory, "--against", finished.directory, "--bands", "3", "--json")
    one, other = command(*asked).json["checkpoints"]
    assert one == other
    assert sum(band["ids"] for band in one["bands"]) == VOCAB
    assert sum(band["tokens"] for band in one["bands"]) == whole["tokens"]
    loss = sum(band["tokens"] * band["loss"] for band in one["bands"]) / whole["tokens"]
    assert loss == pytest.approx(whole["loss"], rel=1e-6)


def test_routing_table_round_trip(finished: RunConfig, tmp_path: Path) -> None:
    copy = tmp_path / "table.safetensors"
    of_run = command_here("routing", "table", finished.directory, "--json", "--output", str(copy)).json
    assert command_here("routing", "table", str(copy), "--json").json == of_run
    kept = Path(finished.directory) / "routing_table.safetensors"
    assert command_here("routing", "table", str(kept), "--json").json == of_run
    (switch,) = history(finished, "switch")
    assert of_run["sha256"] == switch["table_sha256"]
    assert (of_run["layers"], of_run["experts"], of_run["top_k"]) == (1, 4, 1)


def test_table_is_the_same_in_every_checkpoint_of_stage_2(finished: RunConfig) -> None:
    tables = {
        command_here("routing", "table", str(checkpoint_of(finished, step)), "--json").json["sha256"]
        for step in (SWITCH, 9, STEPS)
    }
    assert len(tables) == 1


def test_config_show(finished: RunConfig, tmp_path: Path) -> None:
    path = run_file(finished, tmp_path / "run.yaml")
    facts = command_here("config", "show", path, "--json").json
    counts = facts["parameters"]
    assert counts["total"] == counts["shared"] + counts["expert"] + counts["router"] + counts["distilled"]
    assert 0 < counts["shared"] < counts["active"] < counts["shared"] + counts["expert"]
    assert facts["flops_per_token"] > 6 * counts["active"] / 2
    assert facts["run"] == finished.model_dump(mode="json")
    shown = tmp_path / "shown.yaml"
    shown.write_text(command_here("config", "show", path).out)
    assert command_here("config", "show", str(shown), "--json").json == facts


def test_config_check(finished: RunConfig, tmp_path: Path) -> None:
    path = run_file(finished, tmp_path / "run.yaml")
    answer = command_here("config", "check", path, "--world-size", "2")
    assert answer.code == 0
    assert "small on 2 processes" in answer.out
