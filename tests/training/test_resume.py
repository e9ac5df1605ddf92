"""A run that was stopped and goes on is the run that was never stopped, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.run_directory.probe_records import PROBE_IDS
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
    "2 processes, expert 2, ZeRO 3": (2, {"parallel": {"expert": 2, "zero_stage": 3}}, (SWITCH + 1,)),
    "2 processes, expert 2, ZeRO 3, bf16": (
        2,
        {"parallel": {"expert": 2, "zero_stage": 3}, "precision": {"dtype": "bf16"}},
        (SWITCH,),
    ),
    "2 processes, sequence 2, expert 2": (2, {"parallel": {"sequence": 2, "expert": 2}}, (SWITCH,)),
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
        assert "different settings" not in said
        assert differing(tensors_of(checkpoint_of(resumed, STEPS)), end) == []
        assert history(resumed) == history(whole)
        assert probe_records(resumed) == probe_records(whole)


def test_what_a_run_leaves_open_is_as_it_began(data: TinyData, tmp_path: Path) -> None:
    """A run of the time when the embedding was scaled by default, and its YAML never said so."""
    settings = {"model": {"embedding": "scaled"}, "moe": {"router_input": "raw"}}
    whole = small_run(data, tmp_path / "whole", **settings, checkpoint=KEEP_ALL)
    train_run(whole)
    resumed = restarted(whole, tmp_path / "resumed", 3)
    silent = small_run(data, Path(resumed.directory), checkpoint=KEEP_ALL)
    assert "other settings" not in train_run(silent)
    assert differing(tensors_of(checkpoint_of(silent, STEPS)), tensors_of(checkpoint_of(whole, STEPS))) == []


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


def test_resume_says_which_settings_have_changed(data: TinyData, tmp_path: Path) -> None:
    whole = small_run(data, tmp_path / "whole", checkpoint=KEEP_ALL)
    train_run(whole)
    resumed = restarted(whole, tmp_path / "resumed", SWITCH)
    longer = {
        "seed": 7,
        "schedule": whole.schedule.model_copy(update={"steps": 14}),
        "moe": whole.moe.model_copy(update={"bias_step": 0.1}),
    }
    said = train_run(resumed.model_copy(update=longer)).splitlines()
    assert f"with different settings than before: schedule.steps 14 (was {STEPS}), seed 7 (was {whole.seed})" in said
    assert "without effect on router 'stablemoe': moe.bias_step 0.1" in said
    assert history(resumed, "valid")[-1]["step"] == 14, "the report of the shorter run does not end the longer one"


def test_what_was_read_is_not_read_again_by_other_updates(data: TinyData, tmp_path: Path) -> None:
    """Twice the updates, each of half the size: those that remain take the sequences that the others would have."""
    whole = small_run(data, tmp_path / "whole", checkpoint=KEEP_ALL)
    train_run(whole)
    resumed = restarted(whole, tmp_path / "resumed", SWITCH)
    steps = SWITCH + 2 * (STEPS - SWITCH)
    halved = whole.schedule.model_copy(update={"steps": steps, "tokens_per_step": 64})
    said = train_run(resumed.model_copy(update={"schedule": halved}))
    read = 128 * SWITCH
    assert f"{data.train}: epoch 1, {read} of " in said
    one, other = (Checkpoint.open(checkpoint_of(run, n)).progress for run, n in ((whole, STEPS), (resumed, steps)))
    assert one.position.sources == other.position.sources
    assert [line["tokens_read"] for line in history(resumed, "train")][-3:] == [
        128 * STEPS - 128,
        128 * STEPS - 64,
        128 * STEPS,
    ]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{"expert": 2}, {"sequence": 2}], ids=str)
def test_probe_is_the_same_however_many_ranks_there_are(layout: dict[str, int], data: TinyData, tmp_path: Path) -> None:
    """A table never moves a token, so churn would show tokens in another order."""
    whole = small_run(data, tmp_path / "whole", moe={"router": "hash"}, checkpoint=KEEP_ALL, logging={"probe_every": 1})
    train_run(whole)
    resumed = restarted(whole, tmp_path / "resumed", SWITCH)
    train_run(resumed.model_copy(update={"parallel": whole.parallel.model_copy(update=layout)}), 2)
    ids = [np.load(Path(run.directory) / PROBE_IDS) for run in (whole, resumed)]
    assert np.array_equal(*ids)
    assert {line["churn"] for line in history(resumed, "probe")} == {None, 0.0}


def test_another_probe_is_refused(data: TinyData, tmp_path: Path) -> None:
    whole = small_run(data, tmp_path / "run", checkpoint=KEEP_ALL)
    train_run(whole)
    resumed = restarted(whole, tmp_path / "resumed", SWITCH)
    other = resumed.model_copy(update={"logging": whole.logging.model_copy(update={"probe_tokens": 300})})
    with pytest.raises(AssertionError, match="holds records of 512 tokens, now they would be of 300"):
        train_run(other)


def test_a_corpus_of_more_ids_than_the_model_is_refused(data: TinyData, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"model\.vocab_size: got 400: .*train was prepared with 480 ids"):
        train_run(small_run(data, tmp_path / "run", model={"vocab_size": 400}))
