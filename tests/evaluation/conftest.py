from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.tiny import VOCAB, tiny_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from stablemoe_ds.distributed.groups import Groups
    from stablemoe_ds.model.gpt import StableMoEGPT


def shake(model: StableMoEGPT) -> StableMoEGPT:
    """Move every weight, so that experts, which start at zero, and both routers matter."""
    import torch

    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    return model


@pytest.fixture(scope="session")
def build(world_groups: Groups) -> Callable[..., StableMoEGPT]:
    def build_model(**sections: Any) -> StableMoEGPT:
        from stablemoe_ds.model.gpt import StableMoEGPT

        return shake(StableMoEGPT(tiny_run(**sections), VOCAB, world_groups.placement))

    return build_model


@pytest.fixture(scope="session")
def tiny_model(build: Callable[..., StableMoEGPT]) -> StableMoEGPT:
    """RoPE, top-1, word router. Shared: leave its weights and its mode as they are."""
    return build()
