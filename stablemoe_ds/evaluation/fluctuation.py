"""How much routing fluctuates: churn between records, and when each token last changed its expert.

The paper's definition: a token's last fluctuation is the last record that differs from the final one. With
several MoE layers every (layer, token) pair counts as a token of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.run_directory.probe_records import RouteRecords

NEVER = -1
"""Last fluctuation step of a token that every record sends to the same expert."""


def churn(records: RouteRecords) -> NDArray[np.float64]:
    """float64 [H - 1]: share of tokens whose expert differs from the record before; entry r is of record r + 1."""
    expert_HLP = records.expert_HLP
    return (expert_HLP[1:] != expert_HLP[:-1]).mean(axis=(1, 2))


def last_fluctuation_step(records: RouteRecords) -> NDArray[np.int64]:
    """int64 [L, P]: step of the last record that differs from the final one, or ``NEVER``."""
    expert_HLP = records.expert_HLP
    last_LP = np.full(expert_HLP.shape[1:], NEVER, dtype=np.int64)
    for step, expert_LP in zip(records.steps, expert_HLP, strict=True):
        last_LP[expert_LP != expert_HLP[-1]] = step
    return last_LP


def fluctuation_curve(last_LP: NDArray[np.int64], run_steps: int, fractions: Sequence[float]) -> NDArray[np.float64]:
    """float64 [len(fractions)]: share of tokens whose last fluctuation comes after that fraction of the run."""
    return np.array([(last_LP > fraction * run_steps).mean() for fraction in fractions])


def changed_since(records: RouteRecords, step: int) -> float | None:
    """Share of tokens that leave, at any later record, the expert of the first record at or after ``step``.

    A token that leaves and comes back has changed. None if there are not two records to compare.
    """
    expert_HLP = records.expert_HLP[records.steps >= step]
    if len(expert_HLP) < 2:
        return None
    return float((expert_HLP != expert_HLP[0]).any(axis=0).mean())
