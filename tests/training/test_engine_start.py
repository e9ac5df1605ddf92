"""What DeepSpeed costs as an engine is built, and what of it stays behind."""

from __future__ import annotations

import gc
from typing import Any

import deepspeed
import pytest

from stablemoe_ds.distributed.groups import Groups
from tests.benchmarks.updates import engine_of


def test_deepspeed_collects_garbage_without_a_look_at_the_libraries(
    world_groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialize, looked_at = deepspeed.initialize, []

    def watched(**arguments: Any) -> Any:
        looked_at.append(len(gc.get_objects()))
        return initialize(**arguments)

    monkeypatch.setattr(deepspeed, "initialize", watched)
    before = len(gc.get_objects())
    engine_of(world_groups, "bf16", 1)
    assert looked_at[0] < before / 10
    assert gc.get_freeze_count() == 0
    assert len(gc.get_objects()) >= before
