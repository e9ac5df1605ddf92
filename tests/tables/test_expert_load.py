"""Load of experts against the mean, held against fractions worked out one by one."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from stablemoe_ds.tables.expert_load import max_loads, relative_load


@pytest.mark.parametrize("served", [[3, 0, 1], [5], [1, 1, 1, 1], [10**12, 1, 7], [0.5, 0.25, 3]])
def test_load_is_a_share_of_the_mean(served: list[float]) -> None:
    mean = sum(map(Fraction, served)) / len(served)
    wanted = [float(Fraction(one) / mean) for one in served]
    assert relative_load(served).tolist() == pytest.approx(wanted, rel=1e-15)
    assert max_loads([served, served[::-1]]) == pytest.approx([max(wanted)] * 2, rel=1e-15)


def test_each_layer_has_a_mean_of_its_own() -> None:
    served_LN = np.array([[4, 0], [1, 3], [0, 0]])
    assert relative_load(served_LN).tolist() == [[2, 0], [0.5, 1.5], [0, 0]]
    assert max_loads(served_LN.tolist()) == [2, 1.5, 0]
    assert max_loads([]) == []
