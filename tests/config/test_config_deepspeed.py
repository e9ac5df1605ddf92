"""The DeepSpeed configuration a run leads to, and what may not be laid over it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stablemoe_ds.config.batch_plan import batch_plan
from stablemoe_ds.config.deepspeed_config import deepspeed_config
from stablemoe_ds.config.rules import check
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError

Make = Callable[..., RunConfig]


def test_batch_clip_and_stage_follow_from_the_run(make: Make) -> None:
    run = make("parallel.micro_batch=4", "optimizer.clip=0.5", "parallel.zero_stage=2")
    config = deepspeed_config(run, batch_plan(run, 4))
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 4 * 2 * 4
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["contiguous_gradients"] is True
    assert config["zero_optimization"]["reduce_scatter"] is True
    assert not {"bf16", "fp16", "data_types", "optimizer", "scheduler"} & config.keys()


def test_stage_0_leaves_clipping_to_the_engine(make: Make) -> None:
    run = make("parallel.zero_stage=0", "optimizer.clip=0.5")
    assert deepspeed_config(run, batch_plan(run, 1))["gradient_clipping"] == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_accumulates_gradients_in_fp32(make: Make, dtype: str) -> None:
    run = make(f"precision.dtype={dtype}")
    config = deepspeed_config(run, batch_plan(run, 1))
    assert config[dtype]["enabled"] is True
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert len({"bf16", "fp16"} & config.keys()) == 1


def test_escape_hatch_is_merged_last_and_key_by_key(make: Make) -> None:
    run = make(
        "precision.dtype=fp16",
        "precision.loss_scale=64",
        "deepspeed.zero_optimization.overlap_comm=true",
        "deepspeed.fp16.hysteresis=4",
        "deepspeed.wall_clock_breakdown=true",
    )
    check(run, 1)
    config = deepspeed_config(run, batch_plan(run, 1))
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["zero_optimization"]["contiguous_gradients"] is True
    assert config["fp16"] == {"enabled": True, "loss_scale": 64, "initial_scale_power": 16, "hysteresis": 4}
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train_batch_size=8", "the run decides it; nearest that works: set schedule.tokens_per_step"),
        ("gradient_clipping=1", "nearest that works: set optimizer.clip"),
        ("optimizer={type: Adam}", "nearest that works: set section optimizer"),
        ("zero_optimization.stage=3", "nearest that works: set parallel.zero_stage"),
        ("zero_optimization.offload_optimizer={}", "nearest that works: set parallel.offload"),
        ("zero_optimization.offload_param={device: nvme}", "nearest that works: set parallel.offload"),
        ("bf16.enabled=true", "nearest that works: set precision.dtype"),
        (
            "zero_optimization.contiguous_gradients=false",
            "averages gradients of different experts",
        ),
        ("zero_optimization.reduce_scatter=false", "nearest that works: true"),
        ("communication_data_type=bf16", "summed over ranks in fp32"),
        ("data_types.grad_accum_dtype=bf16", "summed over micro-batches in fp32"),
        ("bf16.immediate_grad_update=false", "counted several times"),
        ("prescale_gradients=true", "nearest that works: false"),
        ("elasticity={enabled: true}", "DeepSpeed 0.19 has dropped it"),
        ("zero_optimization=2", "expected a section"),
    ],
)
def test_conflict_is_refused_with_its_reason(make: Make, override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check(make(f"deepspeed.{override}"))
    assert str(caught.value).startswith(f"deepspeed.{override.partition('=')[0]}: ")
    assert said in str(caught.value)
