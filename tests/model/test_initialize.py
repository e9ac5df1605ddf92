"""Start values: the rules of either kind, and nothing but seed and name decides them."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tiny import VOCAB, tiny_run

PAPER = {"positions": "learned", "norm": "layernorm", "activation": "relu", "bias": True, "kv_heads": None}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    """Tensors that both have and that are not the same."""
    return {name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])}


def test_seed_and_name_decide(fresh, whole_weights):
    torch.manual_seed(1)
    one = whole_weights(fresh())
    torch.manual_seed(2)
    assert differing(one, whole_weights(fresh())) == set()
    other = whole_weights(fresh(seed=5))
    constant = {name for name, value in one.items() if value.unique().numel() == 1}
    assert differing(one, other) == one.keys() - constant


def test_a_bigger_model_shares_what_has_the_same_name(fresh, whole_weights):
    small, large = whole_weights(fresh()), whole_weights(fresh(moe={"experts": 8}))
    assert not [name for name in differing(small, large) if ".experts." in name]


@pytest.mark.parametrize("equal", [False, True])
def test_experts_start_apart_or_alike(equal, fresh, whole_weights):
    weights = whole_weights(fresh(moe={"equal_experts": equal}))
    first = [value for name, value in weights.items() if ".experts." in name and name.endswith("w1")]
    assert len(first) == 8
    same = [torch.equal(first[0], other) for other in first[1:4]]
    assert same == [equal] * 3
    assert not torch.equal(first[0], first[4]), "another layer starts apart in any case"


@pytest.mark.parametrize("kind", ["word", "bigram", "cnn"])
def test_default_rules(kind, fresh, whole_weights):
    """Rows of both centroid matrices: orthogonal, norm 0.1. W2 and biases 0, norms 1. Ids: N(0, 1) and N(0, 1/d)."""
    moe = {"sublayers": 2, "shared_experts": 1, "distilled": {"kind": kind}}
    weights = whole_weights(fresh(model=PAPER, moe=moe))
    for name, value in weights.items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "centroids":
            torch.testing.assert_close(value @ value.T, 0.01 * torch.eye(4), atol=1e-6, rtol=1e-4)
        elif leaf in ("w2", "b1", "b2", "bias", "norm_bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif leaf == "w1":
            bound = 1 / math.sqrt(32)
            assert bound * 0.95 < value.abs().max() <= bound, name
        elif leaf == "taps":
            assert 0 < value.abs().max() <= 1 / math.sqrt(5)
        elif "embedding" in name:
            wanted = 1.0 if ".distilled." in name else 0.02
            assert value.std() == pytest.approx(wanted, rel=0.1), name
        else:
            wanted = 0.02 / (math.sqrt(6) if ".linear_proj." in name or ".linear_fc2." in name else 1)
            assert value.std() == pytest.approx(wanted, rel=0.1), name


SHAPES = {
    # Of the paper's base model: the standard deviations that the authors' code shows at width 768, inner width 3072.
    "decoder.layers.0.self_attention.linear_qkv.weight": ((3 * 768, 768), 0.0255),
    "decoder.layers.0.self_attention.linear_qkv.bias": ((3 * 768,), 0.0208),
    "decoder.layers.0.self_attention.linear_proj.weight": ((768, 768), 0.0361),
    "decoder.layers.0.self_attention.linear_proj.bias": ((768,), 0.0),
    "decoder.layers.0.mlp.linear_fc1.weight": ((3072, 768), 0.0208),
    "decoder.layers.0.mlp.linear_fc1.bias": ((3072,), 0.0208),
    "decoder.layers.0.mlp.linear_fc2.weight": ((768, 3072), 0.0104),
    "decoder.layers.0.mlp.linear_fc2.bias": ((768,), 0.0104),
    "decoder.layers.6.moe.experts.3.sublayers.0.w1": ((3072, 768), 0.0208),
    "decoder.layers.6.moe.experts.3.sublayers.0.b1": ((3072,), 0.0208),
    "decoder.layers.6.moe.experts.3.sublayers.0.w2": ((768, 3072), 0.0),
    "decoder.layers.6.moe.experts.3.sublayers.0.b2": ((768,), 0.0104),
    "embedding.word_embeddings.weight": ((1000, 768), 768**-0.5),
}


@pytest.mark.parametrize("name", SHAPES)
def test_fairseq_spreads_as_the_authors_code_does(name):
    from stablemoe_ds.model.initialize import start_value

    size = {"hidden_size": 768, "heads": 12, "ffn_hidden_size": 3072}
    shape, std = SHAPES[name]
    value = start_value(name, shape, tiny_run(model={**PAPER, **size, "embedding": "scaled", "init": "fairseq"}))
    assert value.std().item() == pytest.approx(std, rel=0.06, abs=1e-9)
    if "embedding" not in name and std:
        assert value.abs().max() <= math.sqrt(3) * std * 1.01, "uniform, so nothing is further out"


def test_fairseq_knows_each_matrix_of_the_fused_ones(fresh, whole_weights):
    """Grouped queries: keys and values have fewer outputs than queries, and torch's rule is that of each by itself."""
    model = {**PAPER, "kv_heads": 2, "activation": "swiglu", "init": "fairseq"}
    weights = whole_weights(fresh(model=model, moe={"shared_experts": 1, "ffn_hidden_size": 48}))
    groups = weights["decoder.layers.0.self_attention.linear_qkv.weight"].unflatten(
        0, (2, -1)
    )  # 4 heads of 8 in 2 groups
    parts = {"q": groups[:, :16].flatten(0, 1), "k": groups[:, 16:24].flatten(0, 1), "v": groups[:, 24:].flatten(0, 1)}
    for part in parts.values():
        bound = torch.nn.init.xavier_uniform_(torch.empty(1000, 32)[: part.shape[0]], gain=2**-0.5)
        wanted = math.sqrt(6 / (part.shape[0] + 32) / 2)
        assert bound.abs().max() <= wanted
        assert 0.93 * wanted < part.abs().max() <= wanted
    fc1 = weights["decoder.layers.0.mlp.linear_fc1.weight"]
    assert 0.95 / math.sqrt(32) < fc1.abs().max() <= 1 / math.sqrt(32)
    for name, value in weights.items():
        if name.endswith("b2"):
            assert 0.8 / math.sqrt(48) < value.abs().max() <= 1 / math.sqrt(48), name


def test_plain_embeddings_are_small_and_not_scaled(fresh):
    plain, scaled = (fresh(model={"embedding": kind}) for kind in ("plain", "scaled"))
    ids = torch.arange(VOCAB)[None]
    assert plain.embedding.word_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(plain.embedding.word_embeddings(ids)[0], plain.embedding.word_embeddings.weight)
    assert scaled.embedding.word_embeddings(ids).std().item() == pytest.approx(1, rel=0.1)


def test_fresh_experts_leave_the_model_as_it_is(fresh):
    """Wherever tokens go, a fresh MoE layer is the identity: any routes give the same logits."""
    model = fresh(model=PAPER, moe={"sublayers": 2, "shared_experts": 1}).eval()
    ids_BS = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        known = [dict.fromkeys((2, 3), torch.full((32, 1), expert)) for expert in (0, 3)]
        one, other = (model.logits(ids_BS, routes) for routes in known)
    assert torch.equal(one, other)
