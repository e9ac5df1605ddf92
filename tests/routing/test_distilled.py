"""Features of token ids: what they compute, and that they never look ahead."""

from __future__ import annotations

import math

import pytest
import torch

from stablemoe_ds.routing.distilled import DistilledRouter

KINDS = ("word", "bigram", "cnn", "transformer")
VOCAB, N, LENGTH, DIM, HEADS = 40, 6, 12, 8, 2


def make(kind: str, layers: int = 2) -> DistilledRouter:
    torch.manual_seed(4)
    router = DistilledRouter(kind, VOCAB, N, dim=DIM, layers=layers, width=DIM, heads=HEADS, positions=LENGTH)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return router.eval()


def some_ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(6))


def slow_features(router: DistilledRouter, ids: list[int]) -> torch.Tensor:
    """Features of one sequence in float64, one position at a time."""
    weights = {name: w.detach().double() for name, w in router.features.named_parameters()}
    word = [weights["embedding.weight"][i] for i in ids]
    nothing = torch.zeros(DIM, dtype=torch.float64)
    if router.kind == "word":
        return torch.stack(word)
    if router.kind == "bigram":
        return torch.stack([(word[s] + (word[s - 1] if s else nothing)) / 2 for s in range(len(ids))])
    if router.kind == "cnn":
        taps = weights["taps"]  # the last tap meets the position itself
        return torch.stack([sum(taps[4 - j] * word[s - j] for j in range(5) if s >= j) for s in range(len(ids))])
    x = torch.stack(word) * math.sqrt(DIM) + weights["positions.weight"][: len(ids)]
    for layer in range(len(router.features.encoder.layers)):
        x = slow_encoder_layer(
            x, {k.split(f"layers.{layer}.")[1]: w for k, w in weights.items() if f"layers.{layer}." in k}
        )
    return slow_norm(x, weights["encoder.norm.weight"], weights["encoder.norm.bias"])


def slow_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def slow_encoder_layer(x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    qkv = (
        slow_norm(x, w["norm1.weight"], w["norm1.bias"]) @ w["self_attn.in_proj_weight"].T + w["self_attn.in_proj_bias"]
    )
    width, rows = DIM // HEADS, []
    for s in range(x.shape[0]):
        heads = []
        for head in range(HEADS):
            at = slice(head * width, (head + 1) * width)
            q, k, v = (part[:, at] for part in qkv.split(DIM, -1))
            heads.append((k[: s + 1] @ q[s] / math.sqrt(width)).softmax(0) @ v[: s + 1])
        rows.append(torch.cat(heads))
    x = x + torch.stack(rows) @ w["self_attn.out_proj.weight"].T + w["self_attn.out_proj.bias"]
    inner = slow_norm(x, w["norm2.weight"], w["norm2.bias"]) @ w["linear1.weight"].T + w["linear1.bias"]
    return x + inner.clamp_min(0) @ w["linear2.weight"].T + w["linear2.bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_against_the_slow_reference(kind):
    router, ids_BS = make(kind), some_ids()
    with torch.no_grad():
        got = router(ids_BS)
    wanted = torch.stack([slow_features(router, row) for row in ids_BS.tolist()]) @ router.centroids.detach().double().T
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", [1, 5, LENGTH - 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_id_changes_nothing_earlier(kind, position):
    router, ids_BS = make(kind), some_ids()
    other = ids_BS.clone()
    other[:, position] = (other[:, position] + 1) % VOCAB
    with torch.no_grad():
        before, after = router(ids_BS), router(other)
        cut = router(ids_BS[:, :position])
    assert torch.equal(before[:, :position], after[:, :position])
    torch.testing.assert_close(cut, before[:, :position], rtol=1e-4, atol=1e-5)
    assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize(("kind", "reach"), [("word", 1), ("bigram", 2), ("cnn", 5)])
def test_how_far_back_a_kind_sees(kind, reach):
    router, ids_BS = make(kind), some_ids()
    other = ids_BS.clone()
    other[:, 2] = (other[:, 2] + 1) % VOCAB
    with torch.no_grad():
        changed_S = (router(ids_BS) != router(other)).any(-1).any(0)
    assert changed_S.nonzero().flatten().tolist() == list(range(2, 2 + reach))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_stays_fp32_inside_a_model_that_is_cast(kind, cast):
    router, ids_BS = make(kind), some_ids()
    with torch.no_grad():
        before = router(ids_BS)
        model = torch.nn.ModuleList([router, torch.nn.Linear(2, 2)]).to(cast)
        assert model[1].weight.dtype == cast
        assert {p.dtype for p in router.parameters()} == {torch.float32}
        assert torch.equal(router(ids_BS), before)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(router(ids_BS), before)


def test_double_is_refused_quietly_but_moving_is_not():
    """Only the floating type is kept: a move to another device must go through."""
    router = make("cnn").double().to("meta")
    assert {(p.dtype, p.device.type) for p in router.parameters()} == {(torch.float32, "meta")}


def test_only_the_word_router_is_a_table():
    ids = torch.arange(VOCAB)
    scores = make("word").scores_of_vocabulary()
    for i in ids.tolist():
        torch.testing.assert_close(scores[i], make("word")(torch.tensor([[i]]))[0, 0].detach())
    for kind in KINDS[1:]:
        assert not make(kind).is_table
        with pytest.raises(ValueError, match=f"a {kind} router"):
            make(kind).scores_of_vocabulary()
