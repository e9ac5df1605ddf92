"""Counts, FLOPs and memory against the paper's numbers and against counting by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stablemoe_ds.config.batch_plan import batch_plan
from stablemoe_ds.config.cost_report import render, report
from stablemoe_ds.config.costs import flops_per_token, parameters
from stablemoe_ds.config.load import load_run
from stablemoe_ds.config.memory import activation_bytes, memory_per_rank
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError

Make = Callable[..., RunConfig]
SHIPPED = Path(__file__).parents[2] / "ds_configs"


@pytest.mark.parametrize(
    ("name", "shared", "expert", "gigamacs_per_sequence"),
    [("paper-base", 124.444e6, 453_500_928, 160), ("paper-large", 354.829e6, 3_223_977_984, 465)],
)
def test_paper_models_have_the_papers_counts(name: str, shared: float, expert: int, gigamacs_per_sequence: int) -> None:
    run = load_run(SHIPPED / f"{name}.yaml")
    counts = parameters(run)
    assert counts.expert == expert
    assert counts.shared == pytest.approx(shared, rel=1e-4)
    assert counts.active == counts.shared + expert // run.moe.experts
    assert round(flops_per_token(run) / 6 * 1024 / 1e9) == gigamacs_per_sequence


@pytest.mark.parametrize(("name", "gigamacs_per_sequence"), [("paper-base", 146), ("paper-large", 414)])
def test_paper_backbones_have_the_papers_macs(name: str, gigamacs_per_sequence: int) -> None:
    run = load_run(SHIPPED / f"{name}.yaml", ["moe={router: dense}", "stages={}"])
    assert flops_per_token(run) / 6 * 1024 / 1e9 == pytest.approx(gigamacs_per_sequence, rel=2e-3)
    assert parameters(run).expert == 0


def test_dense_wikitext_run_has_equal_flops_and_active_parameters() -> None:
    sparse, dense = (load_run(SHIPPED / f"{name}.yaml") for name in ("wikitext-2", "wikitext-2-dense"))
    assert flops_per_token(sparse) == flops_per_token(dense)
    assert parameters(sparse).active == parameters(dense).active
    same = {"name", "moe", "stages"}
    assert sparse.model_dump(exclude=same) == dense.model_dump(exclude=same)


def test_modern_shape_by_hand(make: Make) -> None:
    counts = parameters(make("model.tie_embeddings=false"))
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    assert counts.embedding == counts.output == 100 * 32
    assert counts.positions == 0
    assert counts.attention == 4 * attention
    assert counts.ffn == 4 * 3 * 32 * 64
    assert counts.norms == 9 * 32
    assert counts.expert == 8 * (3 * 32 * 64 + 32)
    assert counts.router == 8 * 32
    assert counts.distilled == 108 * 50
    assert counts.shared == 6400 + 4 * attention + 24576 + 288
    assert counts.total == counts.shared + counts.expert + counts.router + counts.distilled


def test_paper_shape_by_hand(make: Make) -> None:
    paper = ("model.positions=learned", "model.norm=layernorm", "model.activation=relu", "model.bias=true")
    counts = parameters(make(*paper, "model.kv_heads=null", "moe.sublayers=3", "moe.layers=[1,3]", "moe.top_k=2"))
    ffn = 2 * 32 * 64 + 64 + 32
    assert counts.positions == 16 * 32
    assert counts.attention == 4 * (4 * 32 * 32 + 4 * 32)
    assert counts.ffn == 4 * ffn
    assert counts.norms == 9 * 64
    assert counts.expert == 2 * 8 * 3 * (ffn + 64)
    assert counts.active == counts.shared + 2 * 2 * 3 * (ffn + 64)


def test_replaced_feed_forward_layers_and_shared_experts(make: Make) -> None:
    moe = "{layers: [2, 4], placement: replace, shared_experts: 2, ffn_hidden_size: 16, top_k: 3}"
    run = make(f"moe={moe}")
    counts = parameters(run)
    assert counts.ffn == 2 * 3 * 32 * 64
    assert counts.norms == (4 + 2 + 1) * 32
    assert counts.shared_experts == 2 * (3 * 32 * 32 + 32)
    assert counts.served == 2 * 3 * (3 * 32 * 16 + 32)
    attention = 32 * 32 * 2 + 2 * 32 * 16
    weights = 4 * attention + counts.ffn + 2 * (3 + 2) * 3 * 32 * 16 + 100 * 32
    assert flops_per_token(run) == 6 * weights + 12 * 4 * 32 * 16


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("word", 108 * 50),
        ("bigram", 108 * 50),
        ("cnn", 108 * 50 + 5),
        # embedding, positions, centroids, last norm; and two blocks: 4 d^2 + 8 d^2, biases 9 d, norms 4 d
        ("transformer", (100 + 16 + 8 + 2) * 32 + 2 * (12 * 32 * 32 + 13 * 32)),
    ],
)
def test_distilled_routers_are_counted_apart(make: Make, kind: str, expected: int) -> None:
    counts = parameters(make(f"moe.distilled={{kind: {kind}, layers: 2}}"))
    assert counts.distilled == expected
    assert counts.shared == parameters(make()).shared


def test_unknown_vocabulary_is_a_user_error(make: Make) -> None:
    with pytest.raises(UserError, match=r"model.vocab_size: got null"):
        parameters(make("model.vocab_size=null", "data.tokenizer=t.model"))


def test_zero_shards_what_it_should(make: Make) -> None:
    run = make("parallel.expert=2")
    counts, plan = parameters(run), batch_plan(run, 4)
    memory = memory_per_rank(run, plan, 4)
    dense, experts = counts.total - counts.expert, counts.expert // 2
    assert memory[0].weights == memory[1].weights == 4 * (dense + experts)
    assert memory[0].optimizer == 8 * (dense + experts)
    # dense parameters over 4 ranks, each expert over its 2 copies
    assert memory[1].optimizer == memory[2].optimizer == memory[3].optimizer == 12 * (dense // 4 + experts // 2)
    # beside its share of all, the experts of one MoE layer and their router are whole
    layer = (experts + counts.shared_experts + counts.router + counts.distilled) // len(run.moe.layers)
    assert memory[3].weights == 4 * (dense // 4 + experts // 2 + max(layer, counts.embedding))
    # ZeRO keeps a second copy of the share of fp32 gradients that it has reduced
    assert memory[1].gradients == 4 * (dense + experts) + 4 * (dense // 4 + experts // 2)
    assert memory[2].gradients == 8 * (dense // 4 + experts // 2)


def test_replicated_experts_are_on_every_rank_and_sharded_over_all(make: Make) -> None:
    """Of eight experts one is replicated; of the others each of two ranks has room for four."""
    run = make("parallel.expert=2", "parallel.expert_placement=load", "parallel.replicated_experts=1")
    counts, memory = parameters(run), memory_per_rank(run, batch_plan(run, 4), 4)
    dense, one = counts.total - counts.expert, counts.expert // 8
    assert memory[0].weights == 4 * (dense + 4 * one + one)
    assert memory[1].optimizer == 12 * (dense // 4 + 4 * one // 2 + one // 4)
    layer = (5 * one + counts.shared_experts + counts.router + counts.distilled) // len(run.moe.layers)
    assert memory[3].weights == 4 * (dense // 4 + 4 * one // 2 + one // 4 + max(layer, counts.embedding))
    alone = make("parallel.expert_placement=load", "parallel.replicated_experts=1")
    assert memory_per_rank(alone, batch_plan(alone, 1), 1) == memory_per_rank(make(), batch_plan(make(), 1), 1)


def test_half_precision_keeps_masters_and_halves_weights(make: Make) -> None:
    full, half = make(), make("precision.dtype=bf16")
    plan = batch_plan(full, 1)
    assert memory_per_rank(half, plan, 1)[1].weights * 2 == memory_per_rank(full, plan, 1)[1].weights
    assert memory_per_rank(half, plan, 1)[1].optimizer == memory_per_rank(full, plan, 1)[1].optimizer
    assert memory_per_rank(half, plan, 1)[1].gradients == 4 * parameters(half).total


def test_activations_grow_with_the_micro_batch_and_shrink_with_recomputation(make: Make) -> None:
    one, two = make("parallel.micro_batch=1"), make("parallel.micro_batch=2")
    assert activation_bytes(two, batch_plan(two, 1)) == 2 * activation_bytes(one, batch_plan(one, 1))
    thin = make("parallel.micro_batch=1", "parallel.recompute=true")
    assert activation_bytes(thin, batch_plan(thin, 1)) < activation_bytes(one, batch_plan(one, 1))


def test_sequence_ranks_share_activations_and_are_sharded_over_like_data_ranks(make: Make) -> None:
    data, sequence = make("parallel.micro_batch=1"), make("parallel.micro_batch=1", "parallel.sequence=4")
    plans = batch_plan(data, 4), batch_plan(sequence, 4)
    assert plans[1].data_parallel == 1
    assert plans[1].accumulation == 4 * plans[0].accumulation
    one, other = memory_per_rank(data, plans[0], 4)[3], memory_per_rank(sequence, plans[1], 4)[3]
    assert other.activations * 4 == one.activations
    assert (other.weights, other.gradients, other.optimizer) == (one.weights, one.gradients, one.optimizer)


def test_report_has_the_keys_scripts_read_and_is_json(make: Make) -> None:
    run = make("parallel.expert=2", "parallel.tensor=2")
    facts = report(run)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["world_size"] == 2
    counts = parameters(run)
    assert facts["parameters"]["shared"] == counts.shared == sum(facts["parameters"]["components"].values())
    assert facts["parameters"]["expert"] == counts.expert
    assert facts["parameters"]["active"] == counts.active
    assert facts["flops_per_token"] == flops_per_token(run)
    assert facts["batch"]["tokens_per_step"] == 512
    assert facts["training"]["switch_step"] == 10
    assert set(facts["memory_per_rank"]) == {"zero0", "zero1", "zero2", "zero3"}


def test_page_for_people_shows_the_numbers() -> None:
    page = render(report(load_run(SHIPPED / "paper-base.yaml"), 32))
    for text in ("124,442,880", "453,500,928", "939,391,488", "32 processes", "stage 2 from update 6001", "(this run)"):
        assert text in page
    assert "1024 a sequence x 8 a micro-batch x 2 accumulated x 32 ranks" in page


@pytest.mark.parametrize("length", [1, 2, 16])
def test_causal_flops_count_the_pairs_that_the_mask_leaves(make: Make, length: int) -> None:
    run = make(f"data.sequence_length={length}")
    seen = sum(key <= query for query in range(length) for key in range(length))
    # Two products (scores, values) of a multiply and an add for each pair and channel; backward costs twice forward.
    saved = (length * length - seen) * 2 * 2 * 3 * run.model.hidden_size * run.model.layers
    assert (flops_per_token(run) - flops_per_token(run, causal=True)) * length == saved
    assert report(run)["causal_flops_per_token"] == flops_per_token(run, causal=True)
