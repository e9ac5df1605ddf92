"""Gradients reach AdamW as they were summed in fp32: in fp16 too, which a CPU does not have."""

from __future__ import annotations

import pytest

from tests.distributed.launch import run_distributed
from tests.training.test_gradients import assert_exact, gradients_of_an_update, run_of_update


@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_adamw_gets_the_fp32_sum(dtype: str, zero: int) -> None:
    assert_exact(run_distributed(1, gradients_of_an_update, run_of_update(dtype, zero, ranks=1, expert=1)))
