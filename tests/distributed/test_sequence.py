"""Ranks that share sequences compute what one rank does with whole ones: masks, positions, neighbours, losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from tests.distributed.launch import run_distributed
from tests.model.test_documents import EOS, PAPER
from tests.tiny import VOCAB, tiny_run

pytestmark = pytest.mark.distributed
RANKS = 2
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("bigram", {"kv_heads": 1}, "none"),
    ("bigram", PAPER, "attention"),
    ("cnn", PAPER, "attention_and_positions"),
    ("transformer", {}, "attention"),
]


def run_of(kind: str, model: dict[str, Any], mask: str, sequence: int) -> RunConfig:
    data = {"sequence_length": 16, "document_mask": mask, "eos_id": EOS}
    return tiny_run(model=model, moe={"distilled": {"kind": kind}}, data=data, parallel={"sequence": sequence})


def whole_batch() -> Batch:
    """Documents that cross the border between two parts, and padding."""
    ids = torch.randint(VOCAB, (3, 17), generator=torch.Generator().manual_seed(5))
    ids[0, [2, 11]] = ids[1, [7, 8]] = EOS
    real = torch.ones(3, 16, dtype=torch.bool)
    real[2, 10:] = False
    return Batch(ids[:, :-1], ids[:, 1:], real, real)


def computed(run: RunConfig, placement: Any, batch: Batch) -> dict[str, Tensor]:
    """In both stages: losses [B, S], experts [L, B, S], and every gradient of all losses."""
    from stablemoe_ds.model.gpt import StableMoEGPT
    from stablemoe_ds.moe.routing_pass import view_of
    from stablemoe_ds.routing.fixed import freeze
    from stablemoe_ds.routing.source import LEARNED, routes_of

    model = StableMoEGPT(run, VOCAB, placement).train()
    random, found = torch.Generator().manual_seed(11), {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    for stage, routes in ((1, LEARNED), (2, freeze(model.distilled_routers, 1, (2, 3)))):
        model.zero_grad()
        out = model(batch, routes_of(view_of(batch), routes))
        auxiliary = [out.auxiliary_sum(name) for name in ("balance", "distill")]
        (out.loss_sum + sum(part for part in auxiliary if part is not None)).backward()
        experts = [layer.expert_TK.view(-1, len(batch.ids)).T for layer in out.layers]
        found |= {f"{stage} loss": out.loss_BS.detach(), f"{stage} experts": torch.stack(experts)}
        found |= {f"{stage} {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found


def both_ways() -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What a rank does: each case with whole sequences, and with its part of them."""
    from stablemoe_ds.distributed.groups import Groups, start_world, stop_world
    from stablemoe_ds.distributed.placement import ALONE

    groups, batch = Groups(start_world(), 1, 1, RANKS), whole_batch()
    part = batch.part(groups.sequence_rank, RANKS)
    found = []
    for case in CASES:
        parts = computed(run_of(*case, RANKS), groups.placement, part)
        for name, gradient in parts.items():
            if not name.endswith((" loss", " experts")):
                parts[name] = groups.sum_over_data_ranks(gradient)
        found.append((computed(run_of(*case, 1), ALONE, batch), parts))
    stop_world()
    return found


def test_parts_are_the_whole() -> None:
    for case, ranks in zip(CASES, zip(*run_distributed(RANKS, both_ways), strict=True), strict=True):
        whole = ranks[0][0]
        for name, wanted in whole.items():
            parts = [rank[1][name] for rank in ranks]
            cut_up = name.endswith((" loss", " experts"))
            got = torch.cat(parts, -1) if cut_up else parts[0]
            assert torch.allclose(got, wanted, rtol=1e-4, atol=2e-5), (case, name, float((got - wanted).abs().max()))


def whole_sequences_refused() -> None:
    from stablemoe_ds.distributed.groups import Groups, start_world, stop_world
    from stablemoe_ds.model.gpt import StableMoEGPT

    groups = Groups(start_world(), 1, 1, RANKS)
    model = StableMoEGPT(run_of("word", {}, "none", RANKS), VOCAB, groups.placement)
    with pytest.raises(ValueError, match="expected a part of each sequence, as there are 2 sequence ranks"):
        model(whole_batch())
    stop_world()


def test_a_model_over_sequence_ranks_takes_no_whole_sequences() -> None:
    run_distributed(RANKS, whole_sequences_refused)


def test_sequences_are_cut_evenly_or_not_at_all() -> None:
    batch = whole_batch()
    assert batch.part(0, 1) is batch
    parts = [batch.part(rank, 4) for rank in range(4)]
    assert [part.first for part in parts] == [0, 4, 8, 12]
    assert torch.equal(torch.cat([part.labels for part in parts], 1), batch.labels)
    assert all(torch.equal(part.map(torch.clone).whole_ids, batch.ids) for part in parts)
    with pytest.raises(ValueError, match="sequences of 16 tokens cannot be cut over 3 ranks"):
        batch.part(0, 3)
