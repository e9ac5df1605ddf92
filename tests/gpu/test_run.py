"""A small run on the GPU through the command line: both stages, a stop, going on, evaluation and text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stablemoe_ds.config.schema import RunConfig
from tests.training.runs import STEPS, SWITCH, checkpoint_of, history, restarted, run_file, small_run, tiny_data

FIRST = SWITCH + 3


def stablemoe(*argv: str) -> str:
    """What the command prints. It runs in a process of its own, as whoever types it would start it."""
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "stablemoe_ds", *argv]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16-zero3": ("bf16", {"zero_stage": 3}),
    "bf16-offload-all": ("bf16", {"zero_stage": 3, "offload": "all"}),
    "bf16-offload-optimizer": ("bf16", {"zero_stage": 3, "offload": "optimizer"}),
    "fp16-zero3": ("fp16", {"zero_stage": 3}),
    "bf16-zero1": ("bf16", {"zero_stage": 1}),
    "bf16-zero2": ("bf16", {"zero_stage": 2}),
    "fp16-zero1": ("fp16", {"zero_stage": 1}),
    "fp32-zero1": ("fp32", {"zero_stage": 1}),
}


@pytest.fixture(scope="module", params=CELLS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run with checkpoints 3 (stage 1), 6 (the switch), 9 and 12."""
    dtype, parallel = CELLS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    data = tiny_data(tmp_path_factory.getbasetemp() / "tiny-data")
    run = small_run(
        data,
        folder / "run",
        data={"tokenizer": data.tokenizer},
        precision={"dtype": dtype},
        parallel=parallel,
        checkpoint={"every": 3, "keep": 9},
        optimizer={"lr": 1e-2},
    )
    said = stablemoe("train", run_file(run, folder / "run.yaml"))
    assert "1 x cuda" in said
    return run


def test_both_stages_are_trained(run: RunConfig) -> None:
    lines = history(run, "train")
    assert [line["stage"] for line in lines] == [1] * SWITCH + [2] * (STEPS - SWITCH)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(sum(line["load"]) > 0 for line in lines)


def test_nothing_moves_after_the_switch(run: RunConfig) -> None:
    churn = [line["churn"] for line in history(run, "probe") if line["step"] > SWITCH + 1]
    assert churn
    assert not any(churn)


@pytest.mark.parametrize("step", [3, FIRST], ids=["stage 1", "stage 2"])
def test_a_resumed_run_is_the_uninterrupted_one(run: RunConfig, tmp_path: Path, step: int) -> None:
    again = restarted(run, tmp_path / "run", step)
    said = stablemoe("train", run_file(again, tmp_path / "run.yaml"))
    assert f"continuing after update {step}" in said
    got, wanted = ([line["loss"] for line in history(one, "train")] for one in (again, run))
    # Not to the bit: some of CUDA's sums depend on the order in which threads come.
    assert got == pytest.approx(wanted, rel=1e-4 if run.precision.dtype == "fp32" else 1e-2)


def test_the_checkpoint_is_evaluated_and_generates(run: RunConfig) -> None:
    checkpoint = str(checkpoint_of(run, STEPS))
    answer = json.loads(stablemoe("eval", checkpoint, "--json"))
    assert answer["step"] == STEPS
    assert answer["perplexity"] == pytest.approx(history(run, "valid")[-1]["perplexity"], rel=1e-3)
    text = json.loads(stablemoe("generate", checkpoint, "--prompt", "def ", "--tokens", "8", "--json"))
    assert len(text) == 1
    assert text[0]["prompt"] == "def "
