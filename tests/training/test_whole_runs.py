"""Short runs from end to end: every kind of router and layer, what they leave behind, and a model that breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stablemoe_ds.config.schema import RunConfig
from tests.training.runs import (
    STEPS,
    SWITCH,
    TinyData,
    checkpoint_of,
    history,
    probe_records,
    small_run,
    train_run,
)

KINDS: dict[str, dict[str, Any]] = {
    "bigram": {"moe": {"distilled": {"kind": "bigram"}}},
    "cnn": {"moe": {"distilled": {"kind": "cnn"}}},
    "transformer": {"moe": {"distilled": {"kind": "transformer", "layers": 2}}},
    "top-2, shared expert": {"moe": {"top_k": 2, "shared_experts": 1}},
    "capacity": {"moe": {"capacity_factor": 0.75}},
    "two layers, in place of the feed-forward layer": {"moe": {"layers": [1, 2], "placement": "replace"}},
    "recompute, accumulation": {"parallel": {"recompute": True, "micro_batch": 2}, "moe": {"sublayers": 2}},
}


def changed_after_switch(run: RunConfig) -> float:
    """Largest share of probe tokens that are elsewhere in a later record than right after the switch."""
    records = {
        int(name.split(".")[0]): np.load(Path(run.directory) / "probe" / name) for name in sorted(probe_records(run))
    }
    assert max(records) == STEPS
    frozen = records[SWITCH]
    return max(float((records[step] != frozen).mean()) for step in records if step >= SWITCH)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finishes_and_stays_frozen(kind: str, data: TinyData, tmp_path: Path) -> None:
    run = small_run(data, tmp_path / "run", optimizer={"lr": 2e-2}, **KINDS[kind])
    train_run(run)
    assert changed_after_switch(run) == 0
    lines = history(run, "train")
    assert [line["stage"] for line in lines] == [1] * SWITCH + [2] * (STEPS - SWITCH)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all((line["agreement"] is None) == (line["stage"] == 2) for line in lines)
    assert all(len(line["load"]) == len(run.moe.layers) for line in lines)
    drops = [line["drop_rate"] for line in lines]
    if run.moe.capacity_factor:
        assert all(0.2 < drop < 1 for drop in drops), "a quarter of the tokens finds no room, however even the load"
    else:
        assert set(drops) == {None}
    (switch,) = history(run, "switch")
    is_table = run.moe.distilled.kind == "word"
    assert bool(switch["table_sha256"]) == is_table
    assert (checkpoint_of(run, STEPS) / "routing_table.safetensors").exists() == is_table
    assert switch["load"] >= 1


def test_stage_1_would_have_moved(data: TinyData, tmp_path: Path) -> None:
    """The measure of the test above can be other than zero: without a switch, tokens do change their expert."""
    run = small_run(data, tmp_path / "run", optimizer={"lr": 2e-2}, stages={"at_step": None, "never": True})
    train_run(run)
    assert changed_after_switch(run) > 0


def test_dense_model(data: TinyData, tmp_path: Path) -> None:
    dense = {"moe": {"router": "dense", "layers": []}, "stages": {"at_step": None}}
    run = small_run(data, tmp_path / "run", optimizer={"lr": 2e-2}, **dense)
    train_run(run)
    lines = history(run, "train")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["load"] == []
    assert probe_records(run) == {}


def test_report_of_a_finished_run(finished: RunConfig) -> None:
    folder = Path(finished.directory)
    report = json.loads((folder / "report.json").read_text())
    valid = history(finished, "valid")
    assert report["changed_after_switch"] == 0
    assert report["tokens_per_second"] > 0
    assert report["valid_ppl"] == {
        "stage1": valid[0]["perplexity"],
        "stage1_distilled": valid[0]["perplexity_distilled"],
        "final": valid[-1]["perplexity"],
    }
    assert (valid[0]["stage"], valid[-1]["stage"]) == (1, 2)
    assert valid[-1]["perplexity"] < valid[0]["perplexity"], "six updates at this rate make a difference"
    assert report["test_ppl"] == valid[-1]["perplexity"], "the test text is the validation text here"
    assert report["switch"]["step"] == SWITCH
    assert sum(report["layers"][0]["load"]) == pytest.approx(4)
    picture = (folder / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    assert checkpoint_of(finished, STEPS).samefile(folder / "checkpoints" / (folder / "checkpoints/latest").read_text())
