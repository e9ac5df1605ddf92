"""DeepSpeed's configuration, derived from the run, and the keys that a run may not override."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stablemoe_ds.config.batch_plan import BatchPlan
from stablemoe_ds.config.messages import show
from stablemoe_ds.config.schema import RunConfig

BUCKET = 50_000_000

OWNED = {
    "train_batch_size": "schedule.tokens_per_step",
    "train_micro_batch_size_per_gpu": "parallel.micro_batch",
    "gradient_accumulation_steps": "schedule.tokens_per_step and parallel.micro_batch",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "section optimizer",
    "scheduler": "section schedule",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer": "parallel.offload",
    "zero_optimization.offload_param": "parallel.offload",
    "bf16.enabled": "precision.dtype",
    "fp16.enabled": "precision.dtype",
    "fp16.loss_scale": "precision.loss_scale",
    "torch_autocast": "precision.dtype",
}
UNSAFE = {
    "zero_optimization.contiguous_gradients": (True, "without it ZeRO 1 averages gradients of different experts"),
    "zero_optimization.reduce_scatter": (True, "DeepSpeed's MoE under ZeRO is refused without it"),
    "prescale_gradients": (False, "DeepSpeed's ZeRO 2 refuses it"),
    "gradient_predivide_factor": (1.0, "DeepSpeed's ZeRO 2 refuses it"),
    "communication_data_type": ("fp32", "gradients are summed over ranks in fp32"),
    "data_types.grad_accum_dtype": ("fp32", "gradients are summed over micro-batches in fp32"),
    "bf16.immediate_grad_update": (True, "otherwise gradients of the first micro-batches are counted several times"),
}
UNUSABLE = {
    "amp": "DeepSpeed 0.19 has dropped it",
    "elasticity": "DeepSpeed 0.19 has dropped it",
    "autotuning": "it starts runs of its own under ZeRO 3, which DeepSpeed's MoE does not have",
}


def deepspeed_config(run: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given; no optimizer section, as the optimizer is our own AdamW.

    The run's ``deepspeed`` section is merged over it, key by key. ``rules.check`` has refused what would break.
    """
    stage, dtype = run.parallel.zero_stage, run.precision.dtype
    config: dict[str, Any] = {
        # As DeepSpeed counts: to it ranks that share sequences are data ranks like others.
        "train_batch_size": plan.sequences_per_step * plan.sequence,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        # At stage 0 DeepSpeed's norm is wrong with expert parallelism, so the engine clips by itself.
        "gradient_clipping": run.optimizer.clip if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        },
        # Otherwise DeepSpeed reduces in the model's dtype: it would round what was added up in fp32.
        "communication_data_type": "fp32",
        # DeepSpeed's timer waits for the device twice a micro-batch; training/throughput.py needs no such wait.
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if stage == 3:
        # A weight is gathered where it is needed and let go at once, whatever its size: by DeepSpeed's own measure
        # models of up to 1e9 parameters would stay whole on every rank after all.
        config["zero_optimization"] |= {
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": BUCKET,
        }
    if run.parallel.offload:
        # torch's AdamW updates on the CPU as well; DeepSpeed's own for CPUs would have to be compiled.
        config["zero_force_ds_cpu_optimizer"] = False
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if run.parallel.offload == "all":
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if dtype == "bf16":
        # Each gradient is added to the fp32 sum and let go as soon as the backward pass has made it.
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": run.precision.loss_scale, "initial_scale_power": 16}
    if dtype != "fp32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(config, run.deepspeed)


def conflicts(run: RunConfig) -> Iterator[str]:
    """One line for each key of the run's ``deepspeed`` section that would break or contradict the run."""
    extra = run.deepspeed
    for key, owner in OWNED.items():
        found, value = _find(extra, key)
        if found:
            yield f"deepspeed.{key}: got {show(value)}: the run decides it; nearest that works: set {owner}"
    for key, (safe, reason) in UNSAFE.items():
        found, value = _find(extra, key)
        if found and value != safe:
            yield f"deepspeed.{key}: got {show(value)}: {reason}; nearest that works: {show(safe)}"
    for key, reason in UNUSABLE.items():
        if key in extra:
            yield f"deepspeed.{key}: {reason}; nearest that works: leave it out"
    for key in ("zero_optimization", "bf16", "fp16", "data_types"):
        if key in extra and not isinstance(extra[key], dict):
            yield f"deepspeed.{key}: got {show(extra[key])}: expected a section: keys and values below it"


def _find(tree: dict[str, Any], key: str) -> tuple[bool, Any]:
    """Whether a dotted key is there, and its value."""
    value: Any = tree
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``: sections are joined, anything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
