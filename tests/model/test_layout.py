"""Whole tensors and the parts of them that ranks hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stablemoe_ds.model.layout import Piece, pieces
from tests.tiny import VOCAB, tiny_run


def piece(shape: tuple[int, ...], cut_dim: int | None, blocks: int = 1) -> Piece:
    return Piece("x", shape, nn.Parameter(torch.empty(0)), None, cut_dim, blocks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("cut_dim", "blocks"), [(0, 1), (1, 1), (0, 2), (None, 1)])
def test_parts_make_up_the_whole(ranks, cut_dim, blocks):
    whole = torch.arange(16.0 * 12).view(16, 12)
    one = piece((16, 12), cut_dim, blocks)
    parts = [one.local_of(whole, rank, ranks) for rank in range(ranks)]
    assert torch.equal(one.whole_of(parts), whole)
    if cut_dim is not None:
        assert {part.shape[cut_dim] for part in parts} == {whole.shape[cut_dim] // ranks}


def test_both_halves_of_a_gated_layer_are_cut():
    """megatron-core's fc1 of swiglu is [gate; value] on every rank: each rank needs its part of both."""
    whole = torch.arange(8)
    gated = piece((8,), 0, blocks=2)
    assert [gated.local_of(whole, rank, 2).tolist() for rank in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert piece((8,), 0).local_of(whole, 1, 2).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("placement", ["after", "replace"])
def test_pieces_cover_every_number_once(placement, fresh):
    model = fresh(moe={"placement": placement, "shared_experts": 1})
    found = list(pieces(model, 1))
    assert len({one.name for one in found}) == len(found)
    assert sum(one.select(one.parameter).numel() for one in found) == sum(p.numel() for p in model.parameters())
    assert all(tuple(one.select(one.parameter).shape) == one.shape for one in found)
    with torch.no_grad():
        for one in found:
            one.select(one.parameter).add_(1000.0)
    assert all((p > 900).all() and (p < 1100).all() for p in model.parameters())


def test_experts_are_named_and_made_by_their_global_id(fresh, whole_weights):
    """A rank with the last two of four experts has the same numbers under the same names as one with all."""
    from stablemoe_ds.distributed.placement import LayerPlacement
    from stablemoe_ds.model.gpt import StableMoEGPT

    every = whole_weights(fresh())
    second = whole_weights(StableMoEGPT(tiny_run(), VOCAB, LayerPlacement(2, 1, None, lambda counts: counts)))
    ids = {name.split(".experts.")[1].split(".")[0] for name in second if ".experts." in name}
    assert ids == {"2", "3"}
    assert [name for name, value in second.items() if not torch.equal(value, every[name])] == []
    assert len(every) - len(second) == sum(".experts.0." in name or ".experts.1." in name for name in every)
