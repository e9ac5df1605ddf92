"""A run that was stopped and goes on is the run that was never stopped, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stablemoe_ds.config.schema import RunConfig
from tests.training.runs import (
    STEPS,
    SWITCH,
    TinyData,
    checkpoint_of,
    differing,
    history,
    probe_records,
    restarted,
    small_run,
    tensors_of,
    train_run,
)

KEEP_ALL = {"every": 1, "keep": 100}
CASES: dict[str, tuple[int, dict[str, Any], tuple[int, ...]]] = {
    "1 process, ZeRO 1, dropout": (
        1,
        {"model": {"dropout": 0.1}, "parallel": {"zero_stage": 1}},
        (3, SWITCH - 1, SWITCH, SWITCH + 1),
    ),
    "1 process, ZeRO 1, bf16": (1, {"parallel": {"zero_stage": 1}, "precision": {"dtype": "bf16"}}, (SWITCH,)),
    "1 process, ZeRO 2, bf16, cnn router": (
        1,
        {"moe": {"distilled": {"kind": "cnn"}}, "parallel": {"zero_stage": 2}, "precision": {"dtype": "bf16"}},
        (SWITCH + 1,),
    ),
    "2 processes, expert 2, ZeRO 0": (2, {"parallel": {"expert": 2, "zero_stage": 0}}, (SWITCH - 1,)),
    "2 processes, expert 2, ZeRO 1, dropout, transformer router": (
        2,
        {
            "model": {"dropout": 0.1},
            "moe": {"distilled": {"kind": "transformer"}},
            "parallel": {"expert": 2, "zero_stage": 1},
        },
        (SWITCH - 1, SWITCH + 1),
    ),
    "2 processes, expert 2, ZeRO 2, bf16, accumulation": (
        2,
        {"parallel": {"expert": 2, "zero_stage": 2, "micro_batch": 1}, "precision": {"dtype": "bf16"}},
        (SWITCH,),
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_exact(case: str, data: TinyData, tmp_path: Path) -> None:
    ranks, sections, points = CASES[case]
    # Probes fall between checkpoints, too: what is summed up since the last one must survive.
    sections = {**sections, "checkpoint": KEEP_ALL, "logging": {"probe_every": 4, "eval_every": 5}}
    whole = small_run(data, tmp_path / "whole", **sections)
    train_run(whole, ranks)
    end = tensors_of(checkpoint_of(whole, STEPS))
    assert any(name.endswith("exp_avg_sq") for name in end)
    for point in points:
        resumed = restarted(whole, tmp_path / f"from-{point}", point)
        said = train_run(resumed, ranks)
        assert f"continuing after update {point}, in stage {1 if point < SWITCH else 2}" in said, said
        assert differing(tensors_of(checkpoint_of(resumed, STEPS)), end) == []
        assert history(resumed) == history(whole)
        assert probe_records(resumed) == probe_records(whole)


def plateau_run(data: TinyData, folder: Path) -> RunConfig:
    """Switches when three records in a row hardly differ: by the bound here, as late as update 10."""
    plateau = {"window": 4, "tolerance": 0.9, "earliest": 0.1, "latest": 0.9}
    return small_run(
        data,
        folder,
        stages={"at_step": None, "plateau": plateau},
        checkpoint=KEEP_ALL,
        logging={"probe_every": 2},
    )


def test_resume_keeps_what_the_plateau_has_seen(data: TinyData, tmp_path: Path) -> None:
    whole = plateau_run(data, tmp_path / "whole")
    train_run(whole)
    (switch,) = history(whole, "switch")
    assert switch["step"] < 10, "switched on a plateau, not at its bound"
    resumed = restarted(whole, tmp_path / "resumed", switch["step"] - 1)
    train_run(resumed)
    assert history(resumed) == history(whole)
