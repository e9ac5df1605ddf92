"""Processes that benchmarks start."""

from __future__ import annotations

import os

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from benchmarks.ranks import on_every_rank, reason

pytestmark = pytest.mark.distributed


def ten_times_the_rank(luck: bool) -> int:
    if not luck:
        raise ValueError("no such luck")
    return 10 * int(os.environ["RANK"])


def test_each_rank_gives_what_it_returns() -> None:
    assert on_every_rank(2, ten_times_the_rank, True) == [0, 10]


def test_a_rank_that_fails_says_why() -> None:
    with pytest.raises(ChildFailedError) as caught:
        on_every_rank(1, ten_times_the_rank, False)
    assert reason(caught.value) == "ValueError: no such luck"
