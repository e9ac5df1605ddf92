"""What the whole suite shares: the CPU, one thread, and process groups of a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ["DS_ACCELERATOR"] == "cpu":  # DS_ACCELERATOR=cuda pytest -m gpu: the tests that need a GPU
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

with suppress(ImportError):  # the tests that need a GPU do without it
    from hypothesis import settings

    settings.load_profile("ci")  # the same examples every time; --hypothesis-profile default draws others

if TYPE_CHECKING:
    from stablemoe_ds.distributed.groups import Groups


@pytest.fixture(scope="session")
def world_groups() -> Iterator[Groups]:
    """megatron-core's and DeepSpeed's groups in this process alone; whatever builds a model needs them."""
    from stablemoe_ds.distributed.groups import Groups, start_world, stop_world

    world = start_world()
    # Programs that a test starts must not take themselves for ranks of this run. LOCAL_RANK stays: DeepSpeed's
    # engine reads it.
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    yield Groups(world, 1, 1)
    stop_world()
