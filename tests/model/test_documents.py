"""Documents kept apart in one sequence are what each of them is in a sequence of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from stablemoe_ds.config.rules import check, with_document_end
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.errors import UserError
from stablemoe_ds.model.document_mask import Documents, block_mask, can_be_fast
from stablemoe_ds.ops.documents import causal_mask, document_starts
from stablemoe_ds.routing.fixed import freeze
from tests.tiny import VOCAB, tiny_run

EOS = 7
PAPER = {"positions": "learned", "norm": "layernorm", "activation": "relu", "bias": True, "kv_heads": None}
SEQUENCES = [
    [[11, 12, EOS], [13, EOS], [EOS], [14, 15, 16, 17, EOS], [18, 19, 20, 21, 22]],  # an empty document among them
    [[9, 8, 10, 11, 12, 13, 14, EOS], [30, 31, 32, 33, 34, 35, 36, EOS]],
]
IDS = torch.tensor([[token for document in documents for token in document] for documents in SEQUENCES])


def with_mask(mask: str, **sections: Any) -> dict[str, Any]:
    return {"data": {"sequence_length": 16, "document_mask": mask, "eos_id": EOS}, **sections}


def batch_of(ids: torch.Tensor) -> Batch:
    every = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, ids.roll(-1, 1), every, every)


def test_starts_by_hand() -> None:
    assert document_starts(IDS, EOS).tolist() == [
        [0, 0, 0, 3, 3, 5, 6, 6, 6, 6, 6, 11, 11, 11, 11, 11],
        [0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8],
    ]
    assert not document_starts(IDS, None).any()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["word", "bigram", "cnn", "transformer"])
@pytest.mark.parametrize("frozen", [False, True], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize(
    ("model", "mask"), [({}, "attention"), (PAPER, "attention_and_positions"), (PAPER, "attention")]
)
def test_logits_are_those_of_each_document_alone(build: Any, model: Any, mask: str, frozen: bool, kind: str) -> None:
    """Rotary positions are relative; learned ones start again, or each document alone is given those it has here."""
    packed = build(model=model, moe={"distilled": {"kind": kind}}, **with_mask(mask)).eval()
    moved = bool(model) and mask == "attention"
    routing = freeze(packed.distilled_routers, 1, (2, 3)) if frozen else None

    def scores(ids_BS: torch.Tensor, apart: bool) -> torch.Tensor:
        return packed.logits(ids_BS, {} if routing is None else routing(ids_BS), apart=apart)

    got = scores(IDS, apart=True)
    for row, documents in enumerate(SEQUENCES):
        first = 0
        for document in documents:
            positions = packed.embedding.position_embeddings.weight if model else None
            if moved:
                kept = positions.clone()
                positions.copy_(kept.roll(-first, 0))
            wanted = scores(torch.tensor([document]), apart=False)[0]
            if moved:
                positions.copy_(kept)
            torch.testing.assert_close(got[row, first : first + len(document)], wanted, rtol=1e-4, atol=1e-4)
            first += len(document)
    assert not torch.allclose(got, scores(IDS, apart=False), atol=1e-2)


@torch.no_grad()
def test_training_evaluation_and_probes_use_the_mask_and_prompts_do_not(build: Any) -> None:
    masked, plain = (build(**with_mask(mask)).eval() for mask in ("attention", "none"))
    batch = batch_of(IDS)
    losses = torch.nn.functional.cross_entropy(
        masked.logits(IDS, apart=True).transpose(1, 2), batch.labels, reduction="none"
    )
    torch.testing.assert_close(masked(batch).loss_BS, losses)
    assert not torch.allclose(masked(batch).loss_BS, plain(batch).loss_BS, atol=1e-2)
    assert torch.equal(masked.logits(IDS), plain.logits(IDS))


@pytest.mark.parametrize("way", [{"recompute": True}, pytest.param({"compile": True}, marks=pytest.mark.slow)], ids=str)
def test_gradients_through_recomputation_and_compiler(build: Any, way: dict[str, Any]) -> None:
    def gradients(parallel: dict[str, Any]) -> list[torch.Tensor]:
        model = build(parallel=parallel, **with_mask("attention")).train()
        model(batch_of(IDS)).loss_sum.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(gradients(way), gradients({}), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 16, 128, 300])
def test_blocks_hold_the_same_mask(length: int) -> None:
    """Against torch's own construction, which looks at every pair, and attention against the mask written out."""
    random = torch.Generator().manual_seed(length)
    ids_BS = torch.randint(90, (3, length), generator=random)
    ids_BS[2] = EOS + 1  # one document
    start_BS = document_starts(ids_BS, EOS)
    blocks, seen_BSS = block_mask(start_BS), causal_mask(start_BS)
    every_pair = create_block_mask(blocks.mask_mod, 3, None, length, length, device="cpu")
    assert torch.equal(blocks.to_dense(), every_pair.to_dense())
    wanted = [[[i >= j >= start_BS[b, i] for j in range(length)] for i in range(length)] for b in range(3)]
    if length <= 128:
        assert torch.equal(seen_BSS, torch.tensor(wanted))
    q, k, v = (torch.randn(3, heads, length, 16, generator=random) for heads in (4, 2, 2))
    by_blocks = flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen_BSS[:, None], enable_gqa=True)
    torch.testing.assert_close(by_blocks, plain, rtol=1e-4, atol=1e-5)


def test_the_fast_kernel_is_for_cuda_and_holds_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stablemoe_ds.model.document_mask.find_spec", lambda _name: object())
    cuda = torch.device("cuda", 0)
    assert can_be_fast(cuda, 64, 0.0)
    assert not can_be_fast(cuda, 8, 0.0)
    assert not can_be_fast(cuda, 64, 0.1), "flex_attention knows no dropout"
    assert not can_be_fast(torch.device("cpu"), 64, 0.0)
    fast = Documents.of(torch.zeros(1, 1 << 14, dtype=torch.int64), fast=True)
    assert fast.mask_BSS is None
    assert fast.blocks is not None


def test_the_end_of_a_document_must_be_known() -> None:
    run = tiny_run(data={"sequence_length": 16, "document_mask": "attention"}, stages={"never": True})
    with pytest.raises(UserError, match="eos_id: got null: documents are kept apart"):
        check(run)
    with pytest.raises(UserError, match="eos_id: got null: nothing says which id"):
        with_document_end(run, None)
    assert with_document_end(run, 3).data.eos_id == 3
    assert with_document_end(tiny_run(), 3).data.eos_id is None
    with pytest.raises(UserError, match=f"eos_id: got {VOCAB}: expected an id below"):
        check(tiny_run(data={"sequence_length": 16, "eos_id": VOCAB}, stages={"never": True}))
