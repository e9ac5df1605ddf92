"""A fresh router must spread tokens: the load before the first update, for every run that is shipped.

The stack runs at its real width up to the first MoE layer, on ids as frequent as words are. Experts themselves play
no part in that, so they are made one neuron wide.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from stablemoe_ds.config.load import load_run
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch

if TYPE_CHECKING:
    from stablemoe_ds.moe.routing_pass import LayerReport

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.yaml"))
TOKENS = 1024
MOST = 4.0
"""Bound on max/mean load. Token frequencies alone force 1.8 on 64 experts (``routing.table.least_load``)."""


@pytest.fixture
def first_moe_layer(world_groups) -> Callable[[RunConfig], LayerReport]:
    """What the first MoE layer of a fresh model that learns to choose does with :data:`TOKENS` tokens."""

    def report(run: RunConfig) -> LayerReport:
        from stablemoe_ds.model.gpt import StableMoEGPT

        first = run.moe.learned_layers[0]
        length = min(run.data.sequence_length, 256)
        vocab = run.model.vocab_size or 32_000
        cut = {
            "model": run.model.model_copy(update={"layers": first}),
            "moe": run.moe.model_copy(
                update={
                    "layers": [first],
                    "table_layers": [],
                    "ffn_hidden_size": 1,
                    "sublayers": 1,
                    "shared_experts": 0,
                }
            ),
            "data": run.data.model_copy(update={"sequence_length": length}),
        }
        model = StableMoEGPT(run.model_copy(update=cut), vocab, world_groups.placement).eval()
        model.output_layer = Skip()
        ids = zipf(vocab, (TOKENS // length, length + 1))
        every = torch.ones(TOKENS // length, length, dtype=torch.bool)
        with torch.no_grad():
            (layer,) = model(Batch(ids[:, :-1], ids[:, 1:], every, every)).layers
        return layer

    return report


class Skip(torch.nn.Module):
    """In the place of the output matrix: half of the arithmetic, and no say in routing."""

    def forward(self, hidden: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return hidden[..., :2], None


def zipf(vocab: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Ids by Zipf and Mandelbrot's law, p(rank) ~ 1 / (rank + 2.7): the commonest is 3 % of the text."""
    random = torch.Generator().manual_seed(0)
    share = 1 / (torch.arange(vocab, dtype=torch.float64) + 3.7)
    ids = torch.multinomial(share, shape[0] * shape[1], replacement=True, generator=random)
    return torch.randperm(vocab, generator=random)[ids].view(shape)


def spread(layer: LayerReport) -> tuple[float, float]:
    """max/mean load, and the share of experts that serve a token."""
    served = layer.served_N.double()
    return float(served.max() / served.mean()), float((served > 0).double().mean())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_runs_start_in_fair_balance(path, first_moe_layer):
    run = load_run(path)
    if not run.moe.facts.routed or run.moe.facts.fixed:
        pytest.skip("no router of this run has anything to balance")
    load, used = spread(first_moe_layer(run))
    assert load < MOST
    assert used >= 0.75


def test_small_embeddings_starve_the_router(first_moe_layer):
    """Why the paper's runs have ``embedding: scaled``: with 0.02 what all tokens share in the stream outweighs them."""
    demo = Path(__file__).parents[2] / "ds_configs" / "demo.yaml"
    scaled, plain = (
        spread(first_moe_layer(load_run(demo, ["moe.experts=16", f"model.embedding={kind}"])))[0]
        for kind in ("scaled", "plain")
    )
    assert scaled < MOST < plain
    assert plain - 1 > 2 * (scaled - 1)
