from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.tiny import VOCAB, tiny_run

if TYPE_CHECKING:
    from stablemoe_ds.distributed.groups import Groups
    from tests.export.small_checkpoints import SavedModel


@pytest.fixture(scope="session", autouse=True)
def _library_at_rest(tmp_path_factory: pytest.TempPathFactory) -> None:
    """transformers copies modeling files into a cache, and asks a hub about what it does not find."""
    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def saved(world_groups: Groups, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SavedModel]:
    """Builds a tiny model with every weight moved, and writes its checkpoint; ``stage`` 2: with a random table."""

    def save(stage: int = 2, **sections: Any) -> SavedModel:
        from tests.export.small_checkpoints import save_model

        run = tiny_run(**sections)
        folder = tmp_path_factory.mktemp("checkpoint")
        return save_model(run, run.model.vocab_size or VOCAB, stage, world_groups.placement, folder)

    return save
