"""Two runs of one seed are one run: equal bit for bit on a CPU, under the same layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import STEPS, TinyData, checkpoint_of, differing, history, small_run, tensors_of, train_run

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 process, dropout": (1, {"model": {"dropout": 0.1}}),
    "2 processes, expert 2, ZeRO 2": (2, {"parallel": {"expert": 2, "zero_stage": 2}}),
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_runs_of_one_seed_are_equal_to_the_bit(case: str, data: TinyData, tmp_path: Path) -> None:
    ranks, sections = CASES[case]
    one, other = (small_run(data, tmp_path / name, **sections) for name in ("one", "other"))
    for run in (one, other):
        train_run(run, ranks)
    assert differing(*(tensors_of(checkpoint_of(run, STEPS)) for run in (one, other))) == []
    assert history(one) == history(other)


def test_another_seed_is_another_run(data: TinyData, tmp_path: Path) -> None:
    one, other = (small_run(data, tmp_path / str(seed)).model_copy(update={"seed": seed}) for seed in (1, 2))
    for run in (one, other):
        train_run(run)
    assert differing(*(tensors_of(checkpoint_of(run, STEPS)) for run in (one, other)))
