"""Rules between sections: each breach is refused with key, value, reason and the nearest setting that works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from stablemoe_ds.config.batch_plan import BatchPlan, batch_plan, nearest_divisor, nearest_multiple
from stablemoe_ds.config.load import load_run
from stablemoe_ds.config.rules import check, switch_step, with_vocabulary
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError

Make = Callable[..., RunConfig]
SHIPPED = Path(__file__).parents[2] / "ds_configs"
DENSE = ("moe.router=dense", "moe.layers=[]", "stages.at_step=null")


def refusal(run: RunConfig, world_size: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check(run, world_size)
    return str(caught.value)


def test_small_run_keeps_every_rule(make: Make) -> None:
    for world_size in (None, 1, 2, 4):
        check(make(), world_size)
    check(make(*DENSE), 1)
    check(make("model.kv_heads=null", "parallel.tensor=2", "parallel.expert=4"), 4)


@pytest.mark.parametrize(
    ("overrides", "reason", "nearest"),
    [
        ("model.heads=5 model.kv_heads=null", "model.heads: got 5: expected a divisor of model.hidden_size 32", "4"),
        ("model.kv_heads=3", "model.kv_heads: got 3: expected a divisor of model.heads 4", "4"),
        (
            "model.hidden_size=36",
            'model.positions: got "rope": rotary positions turn pairs',
            "learned, or model.hidden_size 40",
        ),
        (
            "model.vocab_size=null",
            "model.vocab_size: got null: without data.tokenizer",
            "the tokenizer's file in data.tokenizer",
        ),
        ("moe.layers=[2,9]", "moe.layers: got [2, 9]: expected block numbers from 1 to model.layers 4", "[2]"),
        ("moe.layers=[7]", "moe.layers: got [7]:", "[4]"),
        (
            "moe.router=switch parallel.expert_placement=load",
            "parallel.expert_placement: got \"load\": router 'switch' never follows a table",
            "number",
        ),
        (
            "parallel.expert=2 parallel.replicated_experts=1",
            "parallel.replicated_experts: got 1: with parallel.expert_placement number nothing says which experts",
            "0, or parallel.expert_placement load",
        ),
        (
            "parallel.expert=2 parallel.expert_placement=load parallel.replicated_experts=8",
            "parallel.replicated_experts: got 8: expected fewer than moe.experts 8",
            "7, or parallel.expert 1",
        ),
        (
            "moe.capacity_factor=1.5 parallel.expert=2 parallel.expert_placement=load parallel.replicated_experts=2",
            "parallel.replicated_experts: got 2: with moe.capacity_factor",
            "0, or moe.capacity_factor null",
        ),
        (
            "moe.table=even",
            "moe.table: got \"even\": router 'stablemoe' does not follow it",
            "null; or moe.router table, to follow it in every MoE layer; or moe.start_table instead, to start from it",
        ),
        (
            "moe.router=topk moe.layers=[2,4] moe.table=a/table.safetensors",
            "moe.table: got \"a/table.safetensors\": router 'topk' does not follow it",
            "null; or moe.router table, to follow it in every MoE layer; or moe.table_layers [2], to follow it there; "
            "or moe.start_table instead, to start from it",
        ),
        (
            "moe.router=hash moe.table=even",
            "moe.table: got \"even\": router 'hash' does not follow it",
            "null; or moe.router table, to follow it in every MoE layer",
        ),
        ("DENSE moe.table=even", "moe.table: got \"even\": router 'dense' does not follow it", "null"),
        (
            "moe.router=hash moe.start_table=even",
            "moe.start_table: got \"even\": router 'hash' learns no routes",
            "null, or moe.router table and moe.table",
        ),
        (
            "moe.router=dense moe.layers=[] moe.start_table=even",
            "moe.start_table: got \"even\": router 'dense'",
            "null",
        ),
        (
            "moe.layers=[2,4] moe.table_layers=[2] moe.table=even moe.start_table=even",
            'moe.start_table: got "even": a start is for all MoE layers',
            "null, or moe.table_layers []",
        ),
        (
            "moe.distilled.kind=cnn moe.start_table=cooccurrence",
            'moe.start_table: got "cooccurrence": a cnn router sees more than the id',
            "null, or moe.distilled.kind word",
        ),
        (
            "moe.distilled.kind=cnn parallel.expert_placement=load",
            'parallel.expert_placement: got "load": cnn routers never become a table',
            "number",
        ),
        (
            "moe.capacity_factor=1.0 parallel.dispatch_parts=2",
            "parallel.dispatch_parts: got 2: with moe.capacity_factor an expert's share is of the tokens",
            "1",
        ),
        (
            "stages.at_step=null stages.plateau.latest=0.004 stages.plateau.earliest=0",
            "stages.plateau.latest: got 0.004: of 100 updates that is none",
            "0.01",
        ),
        (
            "data.sequence_length=48 parallel.sequence=3",
            "parallel.sequence: got 3: expected a divisor of model.heads 4",
            "4",
        ),
        (
            "parallel.tensor=2 parallel.sequence=4",
            "parallel.sequence: got 4: expected a divisor of the 2 heads of a tensor rank",
            "2",
        ),
        (
            "data.sequence_length=30 parallel.sequence=4",
            "parallel.sequence: got 4: expected a divisor of data.sequence_length 30",
            "2",
        ),
        ("parallel.expert=3", "parallel.expert: got 3: expected a divisor of moe.experts 8", "4"),
        ("DENSE parallel.expert=2", "parallel.expert: got 2: router 'dense' has no experts to spread", "1"),
        (
            "moe.router=dense_wider parallel.expert=2",
            "parallel.expert: got 2: router 'dense_wider' has no experts to spread",
            "1",
        ),
        (
            "moe.router=base_fixed stages.at_step=null",
            "stages: nothing says when router 'base_fixed' is frozen",
            "stages.at_fraction 0.1 (the paper's), or stages.never true",
        ),
        (
            "stages.at_step=null",
            "stages: nothing says when router 'stablemoe' is frozen",
            "stages.at_fraction 0.1 (the paper's), or stages.never true",
        ),
        (
            "stages.at_step=100",
            "stages.at_step: got 100: stage 1 must end inside the run, after 1 to 99 updates",
            "stages.at_step 99",
        ),
        (
            "stages.at_step=null stages.at_fraction=0.001",
            "stages.at_fraction: got 0.001: stage 1 must end inside the run",
            "stages.at_step 1",
        ),
        (
            "stages.at_step=1 schedule.steps=1",
            "stages.at_step: got 1: stage 1 must end inside the run",
            "schedule.steps 2",
        ),
        (
            "moe.distill_weight=0",
            "moe.distill_weight: got 0: the distilled router learns nothing",
            "0.3 (the default), or stages.never true",
        ),
        (
            "parallel.zero_stage=0 precision.dtype=bf16",
            "parallel.zero_stage: got 0: with bf16 DeepSpeed's wrapper takes one step on zero",
            "1, or precision.dtype fp32",
        ),
        (
            "parallel.zero_stage=0 precision.dtype=fp16",
            "parallel.zero_stage: got 0: with fp16 DeepSpeed's wrapper",
            "1, or precision.dtype fp32",
        ),
        (
            "parallel.zero_stage=3 parallel.compile=true",
            "parallel.compile: got true: blocks are compiled as functions of whole weights",
            "false, or parallel.zero_stage 2",
        ),
        (
            "parallel.zero_stage=3 deepspeed.zero_optimization.zero_quantized_weights=true",
            "deepspeed.zero_optimization.zero_quantized_weights: got",
            "leave it out",
        ),
        (
            "precision.loss_scale=128 precision.dtype=bf16",
            "precision.loss_scale: got 128.0: bf16 needs no loss scale",
            "0",
        ),
        (
            "parallel.tensor=4",
            "model.kv_heads: got 2: expected a multiple of parallel.tensor 4",
            "4, or parallel.tensor 2",
        ),
        (
            "parallel.tensor=8 model.kv_heads=null model.vocab_size=800",
            "model.heads: got 4: expected a multiple of parallel.tensor 8",
            "8, or parallel.tensor 4",
        ),
        (
            "parallel.tensor=2 model.ffn_hidden_size=65",
            "model.ffn_hidden_size: got 65: expected a multiple of parallel.tensor 2",
            "66, or parallel.tensor 1",
        ),
        (
            "parallel.tensor=2 model.vocab_size=101",
            "model.vocab_size: got 101: expected a multiple of parallel.tensor 2",
            "102",
        ),
    ],
)
def test_breach_is_refused_with_reason_and_nearest(make: Make, overrides: str, reason: str, nearest: str) -> None:
    said = refusal(make(*overrides.replace("DENSE", " ".join(DENSE)).split()))
    assert said.startswith(reason)
    assert said.endswith(f"; nearest that works: {nearest}")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("overrides", "world_size", "said"),
    [
        (
            ["parallel.tensor=2"],
            3,
            "world size: got 3: expected a multiple of parallel.tensor 2; nearest that works: 4",
        ),
        (["parallel.expert=4"], 6, "parallel.expert: got 4: expected a divisor of the world size 6"),
        (["parallel.expert=4"], 6, "nearest that works: 2, or 8 processes (torchrun --nproc_per_node 8"),
        ([], 0, "world size: got 0: expected at least one process"),
        (
            ["schedule.tokens_per_step=500"],
            2,
            "schedule.tokens_per_step: got 500: expected a multiple of data.sequence_length 16 x "
            "data-parallel ranks 2 x parallel.micro_batch null (1) = 32; nearest that works: 512",
        ),
        (["parallel.micro_batch=3"], 4, "micro_batch 3 = 192; nearest that works: 576, or parallel.micro_batch 4"),
    ],
)
def test_world_size_must_fit(make: Make, overrides: Sequence[str], world_size: int, said: str) -> None:
    assert said in refusal(make(*overrides), world_size)


def test_all_breaches_are_told_at_once(make: Make) -> None:
    said = refusal(make("model.heads=5", "model.kv_heads=null", "parallel.expert=3", "schedule.tokens_per_step=7"), 3)
    assert [line.partition(":")[0] for line in said.splitlines()] == [
        "model.heads",
        "parallel.expert",
        "schedule.tokens_per_step",
    ]


def test_batch_plan_multiplies_out(make: Make) -> None:
    assert batch_plan(make(), 4) == BatchPlan(4, 8, 1, 32, 512)
    assert batch_plan(make("parallel.micro_batch=2"), 4) == BatchPlan(4, 2, 4, 32, 512)
    assert batch_plan(make("parallel.tensor=2"), 4) == BatchPlan(2, 16, 1, 32, 512)


def test_nearest_settings_work_and_are_nearest() -> None:
    for whole in range(1, 60):
        divisors = [n for n in range(1, whole + 1) if whole % n == 0]
        for value in range(1, 80):
            near = nearest_divisor(whole, value)
            assert near in divisors
            assert abs(near - value) == min(abs(n - value) for n in divisors)
            multiple = nearest_multiple(value, whole)
            assert multiple % whole == 0
            assert multiple > 0
            assert abs(multiple - value) <= max(whole // 2, whole - value)


def test_switch_step_is_the_first_update_of_stage_2(make: Make) -> None:
    assert switch_step(make()) == 10
    assert switch_step(make("stages={at_fraction: 0.25}")) == 25
    assert switch_step(make("stages={never: true}")) is None
    assert switch_step(make("stages={plateau: {}}")) is None


def test_vocabulary_comes_from_the_tokenizer_or_must_hold_it(make: Make) -> None:
    unknown = make("model.vocab_size=null", "data.tokenizer=t.model")
    check(unknown)
    assert with_vocabulary(unknown, 77).model.vocab_size == 77
    assert with_vocabulary(make(), 77).model.vocab_size == 100
    with pytest.raises(UserError, match="got 100: the tokenizer has 128 ids; nearest that works: 128"):
        with_vocabulary(make(), 128)
    with pytest.raises(UserError, match="nearest that works: 78"):
        with_vocabulary(make("model.vocab_size=null", "data.tokenizer=t.model", "parallel.tensor=2"), 77)


@pytest.mark.parametrize(
    ("name", "world_sizes"),
    [
        ("demo", (2, 4)),
        ("wikitext-2", (1, 2, 4, 8)),
        ("wikitext-2-dense", (1, 2, 4, 8)),
        ("paper-base", (8, 16, 32, 64)),
        ("paper-large", (8, 16, 32, 64)),
    ],
)
def test_shipped_configuration_keeps_every_rule(name: str, world_sizes: Sequence[int]) -> None:
    run = load_run(SHIPPED / f"{name}.yaml")
    assert run.name == name
    for world_size in world_sizes:
        check(run, world_size)
