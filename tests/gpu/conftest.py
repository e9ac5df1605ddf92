"""The tests of this folder need a GPU: here they are marked, and skipped where torch sees none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from stablemoe_ds.distributed.groups import Groups

REASON = "torch sees no GPU; where there is one: DS_ACCELERATOR=cuda python -m pytest tests/gpu"


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason=REASON))


@pytest.fixture
def groups(world_groups: Groups) -> Groups:
    """The process groups of this process alone, on the GPU."""
    assert world_groups.world.device.type == "cuda"
    return world_groups
