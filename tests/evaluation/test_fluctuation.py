"""Fluctuation numbers against loops that follow their definitions word by word."""

from __future__ import annotations

import numpy as np
import pytest

from stablemoe_ds.evaluation.fluctuation import NEVER, changed_since, churn, fluctuation_curve, last_fluctuation_step
from stablemoe_ds.run_directory.probe_records import RouteRecords

STEPS = np.array([0, 10, 20, 35, 50])


@pytest.fixture
def records() -> RouteRecords:
    rng = np.random.default_rng(0)
    expert_HLP = rng.integers(0, 3, (5, 2, 40)).astype(np.int16)
    expert_HLP[:, :, :8] = expert_HLP[-1, :, :8]  # some tokens never move
    return RouteRecords(STEPS, expert_HLP)


def histories(records: RouteRecords) -> list[list[int]]:
    """The experts of each (layer, token) over the records, layer by layer."""
    _, layers, tokens = records.expert_HLP.shape
    return [records.expert_HLP[:, layer, token].tolist() for layer in range(layers) for token in range(tokens)]


def slow_last(history: list[int]) -> int:
    differing = [int(step) for step, expert in zip(STEPS, history, strict=True) if expert != history[-1]]
    return max(differing, default=NEVER)


def test_churn(records):
    wanted = [np.mean([h[r] != h[r - 1] for h in histories(records)]) for r in range(1, 5)]
    np.testing.assert_allclose(churn(records), wanted)


def test_last_fluctuation_step(records):
    wanted = [slow_last(history) for history in histories(records)]
    assert last_fluctuation_step(records).reshape(-1).tolist() == wanted
    assert NEVER in wanted
    assert 0 in wanted


def test_fluctuation_curve(records):
    last = last_fluctuation_step(records)
    fractions = [0.0, 0.2, 0.4, 0.5, 0.69, 0.7, 1.0]
    wanted = [np.mean([slow_last(history) > x * 50 for history in histories(records)]) for x in fractions]
    np.testing.assert_allclose(fluctuation_curve(last, 50, fractions), wanted)
    assert wanted[0] > wanted[2] > wanted[-1] == 0


@pytest.mark.parametrize("step", [0, 1, 20, 21, 35])
def test_changed_since(records, step):
    changed = []
    for history in histories(records):
        seen = [expert for s, expert in zip(STEPS, history, strict=True) if s >= step]
        changed.append(any(expert != seen[0] for expert in seen))
    assert changed_since(records, step) == pytest.approx(np.mean(changed))


def test_a_token_that_comes_back_has_changed():
    there_and_back = RouteRecords(np.array([1, 2, 3]), np.array([[[0, 1]], [[1, 1]], [[0, 1]]], dtype=np.int16))
    assert changed_since(there_and_back, 1) == 0.5
    assert last_fluctuation_step(there_and_back).tolist() == [[2, NEVER]]


def test_one_record_proves_nothing(records):
    assert changed_since(records, 36) is None
    assert changed_since(records, 51) is None
    assert churn(RouteRecords(STEPS[:1], records.expert_HLP[:1])).tolist() == []


def test_records_out_of_order_are_refused(records):
    with pytest.raises(ValueError, match="ascend"):
        RouteRecords(STEPS[::-1], records.expert_HLP)
    with pytest.raises(ValueError, match="H, L, P"):
        RouteRecords(STEPS[:-1], records.expert_HLP)
