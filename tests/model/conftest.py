from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.tiny import VOCAB, tiny_run

if TYPE_CHECKING:
    import torch

    from stablemoe_ds.distributed.groups import Groups
    from stablemoe_ds.model.gpt import StableMoEGPT


@pytest.fixture(scope="session")
def fresh(world_groups: Groups) -> Callable[..., StableMoEGPT]:
    """Builds a tiny model as a run would start it."""

    def build_model(**sections: Any) -> StableMoEGPT:
        from stablemoe_ds.model.gpt import StableMoEGPT

        run = tiny_run(**sections)
        return StableMoEGPT(run, run.model.vocab_size or VOCAB, world_groups.placement)

    return build_model


@pytest.fixture(scope="session")
def build(fresh: Callable[..., StableMoEGPT]) -> Callable[..., StableMoEGPT]:
    """Builds a tiny model and moves every weight, so that biases, norms and experts, which start at 0 or 1, matter."""

    def build_model(**sections: Any) -> StableMoEGPT:
        import torch

        model = fresh(**sections)
        random = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
        return model

    return build_model


@pytest.fixture(scope="session")
def whole_weights() -> Callable[..., dict[str, torch.Tensor]]:
    """Copies of a model's tensors, or of what ``read`` makes of its parameters, by canonical name."""

    def collect(
        model: StableMoEGPT, read: Callable[[torch.nn.Parameter], torch.Tensor] = lambda p: p
    ) -> dict[str, torch.Tensor]:
        from stablemoe_ds.model.layout import pieces

        return {piece.name: piece.select(read(piece.parameter)).detach().clone() for piece in pieces(model, 1)}

    return collect
