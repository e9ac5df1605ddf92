"""Who is served when more come than an expert takes."""

from __future__ import annotations

import pytest
import torch

from stablemoe_ds.moe.capacity import capacity_of, kept_rows

SPLITS = [5, 0, 12, 3, 30]


@pytest.mark.parametrize("capacity", [0, 1, 3, 5, 12, 40])
def test_kept_rows_by_expert(capacity):
    kept, splits = kept_rows(SPLITS, capacity, range(len(SPLITS)), 1)
    assert splits == [min(rows, capacity) for rows in SPLITS]
    assert kept.tolist() == sorted(set(kept.tolist()))
    start = 0
    for rows, count in zip(SPLITS, splits, strict=True):
        assert sum(start <= row < start + rows for row in kept.tolist()) == count
        start += rows


def test_the_draw_decides_and_nothing_else_does():
    first, _ = kept_rows(SPLITS, 4, range(len(SPLITS)), 7)
    assert torch.equal(first, kept_rows(SPLITS, 4, range(len(SPLITS)), 7)[0])
    assert not torch.equal(first, kept_rows(SPLITS, 4, range(len(SPLITS)), 8)[0])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    kept_rows(SPLITS, 4, range(len(SPLITS)), 7)
    assert torch.equal(before, torch.get_rng_state()), "drawing must not move torch's own generator"


def test_experts_draw_by_their_global_id():
    """The same expert among other neighbours keeps the same rows of its own."""
    alone, _ = kept_rows([30], 4, [4], 7)
    among, _ = kept_rows(SPLITS, 4, range(len(SPLITS)), 7)
    assert (alone + 20).tolist() == among[-4:].tolist()


def test_victims_are_not_the_last_to_arrive():
    """Over many draws each of 10 rows is kept about as often as any other: 4 of 10 times."""
    served = torch.zeros(10)
    for draw in range(1000):
        served[kept_rows([10], 4, [0], draw)[0]] += 1
    assert served.sum() == 4000
    assert (served - 400).abs().max() < 5 * (1000 * 0.4 * 0.6) ** 0.5


@pytest.mark.parametrize(
    ("factor", "routed", "experts", "capacity"),
    [
        (1.0, 32, 64, 1),  # half a token each
        (0.01, 256, 4, 1),
        (1.0, 0, 8, 1),
        (1.0, 64, 64, 1),
        (2.0, 100, 32, 7),  # 6.25
        (0.1, 30, 1, 3),  # in floating point a little more than 3
        (1.1, 40, 4, 11),
        (1.25, 524_288, 32, 20_480),
    ],
)
def test_capacity_is_rounded_up_and_never_zero(factor, routed, experts, capacity):
    assert capacity_of(factor, routed, experts) == capacity
