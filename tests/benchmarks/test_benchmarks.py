"""Every benchmark runs, small; and what the step benchmark counts is what planning ahead claims to save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MOE_LAYERS = 2
"""Of the quick shape; one micro-batch an update."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def result_of(module: str, *options: str) -> dict[str, Any]:
    """What a benchmark prints with ``--quick --json``."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--json", "--rounds", "1", *options]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["machine"].keys() == {"device", "torch", "python", "threads"}
    return result


@pytest.fixture(scope="module")
def step() -> dict[str, dict[str, Any]]:
    """Figures of each model in a training step of two processes."""
    (row,) = result_of("step", "--processes", "2")["rows"]
    assert row["processes"] == 2
    return dict(row["contestants"])


@pytest.mark.distributed
def test_step_times_every_model(step: dict[str, dict[str, Any]]) -> None:
    assert list(step) == ["dense", "stage 1", "stage 2", "deepspeed capacity 1", "deepspeed dropless"]
    for figures in step.values():
        assert min(figures[name] for name in ("seconds", "mfu", "matrix_bound", "copy_bound", "ratio_to_dense")) > 0
        assert 0 <= figures["waiting"] < 1


@pytest.mark.distributed
def test_a_planned_step_exchanges_no_counts(step: dict[str, dict[str, Any]]) -> None:
    learned, planned = (step[stage]["collectives"] for stage in ("stage 1", "stage 2"))
    assert learned["all_gather"] - planned["all_gather"] == MOE_LAYERS  # counts, one exchange a layer
    assert learned["all_reduce"] - planned["all_reduce"] == MOE_LAYERS  # loads of the balance loss
    assert learned["all_to_all"] == planned["all_to_all"] == 4 * MOE_LAYERS  # there and back, and so the gradients
    assert step["stage 2"]["planner_collectives"] == {"all_gather": 1}


@pytest.mark.distributed
def test_a_planned_step_waits_for_the_norm_alone(step: dict[str, dict[str, Any]]) -> None:
    assert sum(step["stage 1"]["host_waits"].values()) == MOE_LAYERS + 1
    assert sum(step["stage 2"]["host_waits"].values()) == 1


@pytest.mark.distributed
def test_zero_stages_take_turns() -> None:
    (row,) = result_of("zero_stages")["rows"]
    assert list(row["stages"]) == ["ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"]
    assert all(figures["collectives"]["all_to_all"] == 4 * MOE_LAYERS for figures in row["stages"].values())
    assert row["stages"]["ZeRO 3"]["collectives"]["reduce_scatter"] > 0  # of gradients, and weights are gathered


@pytest.mark.distributed
def test_ranks_that_share_a_long_sequence_hold_less_each() -> None:
    (row,) = result_of("long_sequence")["rows"]
    alone, shared, recomputing = (way["peak_bytes"] for way in row["ways"].values())
    assert recomputing < shared < alone


def test_data_prepares_as_megatron_does_and_says_how_long_a_step_waits() -> None:
    result = result_of("data")
    (row,) = result["rows"]
    assert row["tokens"] > 50_000
    assert row["tokens_per_second"].keys() == {"megatron, in process", "stablemoe, in process"}
    assert result["waiting"].keys() == {"0 workers", "1 workers"}


def test_generation_is_timed_with_and_without_the_cache() -> None:
    rows = result_of("generation")["rows"]
    assert [row["batch"] for row in rows] == [1, 16]
    for row in rows:
        assert row["tokens_per_second"].keys() == {"dense", "stage 2", "stage 2, no cache"}


def test_experts_that_are_fetched_are_counted() -> None:
    for row in result_of("resident_experts")["rows"]:
        whole, *parts = row["models"].values()
        assert whole["fetches_per_id_and_layer"] == 0
        assert len(parts) == 4
        for part in parts:
            assert part["expert_megabytes"] < whole["expert_megabytes"]
            assert 0 < part["fetches_per_id_and_layer"] <= 1


@pytest.mark.timeout(1800)
def test_routers_are_compared_on_the_same_text() -> None:
    rows = result_of("routers", "--seconds", "900", "--recipes", "cooccurrence", "stablemoe")["rows"]
    assert [row["recipe"] for row in rows] == ["cooccurrence", "stablemoe"]
    for row in rows:
        assert row["failed"] is None
        first, *_, last = row["points"]
        assert first["tokens"] < last["tokens"]
        assert 0 < first["seconds"] < last["seconds"]
        assert last["perplexity"] < first["perplexity"]


def test_startup_times_help_and_the_first_update() -> None:
    result = result_of("startup")
    assert {"stablemoe --help", "stablemoe train"} <= result["seconds"].keys()
    packages = result["imports"]["stablemoe --help"]
    assert packages.pop("all") >= sum(packages.values()) > 0
    assert "torch" not in packages
