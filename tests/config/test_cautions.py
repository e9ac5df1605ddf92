"""What is allowed and degenerates is said; what is usual is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stablemoe_ds.config.cautions import cautions
from stablemoe_ds.config.cost_report import render, report
from stablemoe_ds.config.load import load_run
from stablemoe_ds.config.rules import check
from stablemoe_ds.config.schema import RunConfig

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.yaml"))
PLATEAU = "stages.at_step=null stages.plateau.latest=0.5"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_runs_have_nothing_to_caution_against(path: Path) -> None:
    run = load_run(path)
    assert list(cautions(run, run.parallel.expert)) == []


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        # 32 tokens for 64 experts: half a token each.
        (
            "moe.experts=64 moe.capacity_factor=1 parallel.micro_batch=2",
            "moe.capacity_factor: got 1.0: an expert's",
        ),
        ("moe.experts=4 moe.capacity_factor=0.01 parallel.micro_batch=2", "moe.capacity_factor: got 0.01: an expert's"),
        ("moe.capacity_factor=0.5", "moe.capacity_factor: got 0.5: even at a perfectly even load 50%"),
        ("moe.router_input=raw", 'moe.router_input: got "raw": with model.embedding plain tokens look alike'),
        ("moe.experts=1", "moe.experts: got 1: there is nothing to route"),
        ("moe.top_k=8", "moe.top_k: got 8: every expert serves every token"),
        ("moe.router=topk moe.bias_step=1", "moe.bias_step: got 1.0"),
        ("moe.router=base moe.experts=64 parallel.micro_batch=1", "moe.experts: got 64: router 'base' shares out 16"),
        (f"{PLATEAU} stages.plateau.window=50", "stages.plateau.window: got 50: nothing can be level"),
        (f"{PLATEAU} stages.plateau.window=20 logging.probe_every=15", "logging.probe_every: got 15: a window of 20"),
        (f"{PLATEAU} stages.plateau.window=20 stages.plateau.latest=1", "stages.plateau.latest: got 1.0"),
        (f"{PLATEAU} stages.plateau.window=20 stages.plateau.tolerance=1", "stages.plateau.tolerance: got 1.0"),
        ("model.dropout=0.999", "model.dropout: got 0.999"),
        ("data.sequence_length=1", "data.sequence_length: got 1"),
        ("schedule.warmup_steps=99", "schedule.warmup_steps: got 99"),
        ("logging.eval_tokens=5", "logging.eval_tokens: got 5: validation predicts less than one sequence of 16"),
        ("logging.probe_tokens=5", "logging.probe_tokens: got 5"),
        ("faults.spike_factor=2 faults.spike_window=100", "faults.spike_window: got 100"),
    ],
)
def test_a_setting_that_degenerates_is_said(make: Callable[..., RunConfig], overrides: str, found: str) -> None:
    run = make(*overrides.split())
    check(run, 1)
    said = cautions(run, 1)
    assert len(said) == 1
    assert said[0].startswith(found)
    facts = report(run, 1)
    assert facts["warnings"] == said
    assert f"WARNING: {found}" in render(facts)


@pytest.mark.parametrize(
    "overrides",
    ["moe.router_input=raw model.embedding=scaled", "moe.router_input=raw moe.router=hash moe.gate=sigmoid"],
)
def test_a_raw_router_that_sees_enough_or_chooses_nothing_is_left_alone(
    make: Callable[..., RunConfig], overrides: str
) -> None:
    assert not cautions(make(*overrides.split()), 1)


def test_the_share_is_of_the_tokens_of_an_expert_parallel_group(make: Callable[..., RunConfig]) -> None:
    """16 tokens are too few for 32 experts; those of two ranks suffice, unless they are the same."""
    settings = ("moe.experts=32", "moe.capacity_factor=1", "parallel.micro_batch=1")
    assert cautions(make(*settings), 2)
    assert not cautions(make(*settings, "parallel.expert=2"), 2)
    assert cautions(make(*settings, "parallel.expert=2", "parallel.tensor=2"), 2)
