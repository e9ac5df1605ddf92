"""Starting ranks: what each returns, what is said of one that fails, and that none is left behind."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from tests.distributed.launch import RankError, run_distributed

pytestmark = pytest.mark.distributed


def place(factor: int) -> tuple[int, str]:
    return factor * int(os.environ["RANK"]), os.environ["WORLD_SIZE"]


def break_on_last(message: str) -> None:
    if os.environ["RANK"] == "1":
        raise ValueError(message)
    time.sleep(1000)


def test_results_come_by_rank() -> None:
    assert run_distributed(2, place, 5) == [(0, "2"), (5, "2")]


def test_a_rank_that_fails_is_quoted_and_the_others_are_ended() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 0, .*another rank failed.*rank 1, exit code 1.*break_on_last"):
        run_distributed(2, break_on_last, "no such luck")
    assert multiprocessing.active_children() == []
