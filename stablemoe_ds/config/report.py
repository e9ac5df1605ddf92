"""What will run and what it costs, as one dictionary for scripts and one page for people."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from stablemoe_ds.config.batch import batch_plan
from stablemoe_ds.config.costs import flops_per_token, parameters
from stablemoe_ds.config.memory import memory_per_rank
from stablemoe_ds.config.rules import switch_step
from stablemoe_ds.config.schema import RunConfig

COMPONENTS = ("embedding", "output", "positions", "attention", "ffn", "norms", "shared_experts")


def report(run: RunConfig, world_size: int | None = None) -> dict[str, Any]:
    """Parameters, FLOPs, memory by ZeRO stage and the batch sum; plain numbers, ready for JSON.

    world_size: processes; None: the fewest the run can have. Expects a run that ``rules.check`` has let pass for
    that many. Raises UserError if the vocabulary is unknown or the batch does not come out even.
    """
    world_size = world_size or smallest_world(run)
    plan = batch_plan(run, world_size)
    counts, flops = parameters(run), flops_per_token(run)
    memory = memory_per_rank(run, plan, world_size)
    tokens = run.schedule.steps * run.schedule.tokens_per_step
    return {
        "name": run.name,
        "world_size": world_size,
        "parameters": {
            **{name: getattr(counts, name) for name in ("shared", "expert", "router", "distilled", "active", "total")},
            "components": {name: getattr(counts, name) for name in COMPONENTS},
        },
        "flops_per_token": flops,
        "forward_macs_per_token": flops // 6,
        "training": {
            "tokens": tokens,
            "flops": tokens * flops,
            "steps": run.schedule.steps,
            "switch_step": switch_step(run),
        },
        "batch": {**asdict(plan), "sequence_length": run.data.sequence_length},
        "parallel": {"data": plan.data_parallel, "tensor": run.parallel.tensor, "expert": run.parallel.expert},
        "zero_stage": run.parallel.zero_stage,
        "memory_per_rank": {f"zero{stage}": {**asdict(m), "total": m.total} for stage, m in memory.items()},
    }


def smallest_world(run: RunConfig) -> int:
    """The fewest processes that tensor and expert parallelism allow."""
    return math.lcm(run.parallel.tensor, run.parallel.expert)


def render(facts: dict[str, Any]) -> str:
    """A report as text."""
    counts, batch, parallel, training = (facts[key] for key in ("parameters", "batch", "parallel", "training"))
    lines = [
        f"{facts['name']} on {_processes(facts['world_size'])}: {_layout(parallel)}, ZeRO {facts['zero_stage']}",
        "",
    ]
    lines += [f"{'parameters':<26}{'':>18}"]
    for name, value in counts["components"].items():
        if value:
            lines.append(f"  {name.replace('_', ' '):<24}{value:>18,}")
    for name, meaning in (
        ("shared", "all of the above"),
        ("expert", "routed experts"),
        ("router", "centroids, and what gates learn"),
        ("distilled", "routers of ids, gone after the switch"),
        ("active", "shared, and the experts of one token"),
        ("total", ""),
    ):
        lines.append(f"{name:<26}{counts[name]:>18,}  {meaning}".rstrip())
    switch = training["switch_step"]
    lines += [
        "",
        f"training FLOPs per token  {facts['flops_per_token']:>18,}  "
        f"forward {_scaled(facts['forward_macs_per_token'])}MACs",
        f"tokens                    {training['tokens']:>18,}  {_scaled(training['flops'])}FLOPs in all",
        f"updates                   {training['steps']:>18,}  "
        + (f"stage 2 from update {switch + 1}" if switch else ""),
        f"tokens per update         {batch['tokens_per_step']:>18,}  = {batch['sequence_length']} a sequence x "
        f"{batch['micro_batch']} a micro-batch x {batch['accumulation']} accumulated x {batch['data_parallel']} ranks",
        "",
        f"{'memory of a rank':<18}{'weights':>12}{'gradients':>12}{'optimizer':>12}{'activations*':>14}{'total':>12}",
    ]
    for stage, row in facts["memory_per_rank"].items():
        mark = " (this run)" if stage == f"zero{facts['zero_stage']}" else ""
        cells = f"{_bytes(row['weights']):>12}{_bytes(row['gradients']):>12}{_bytes(row['optimizer']):>12}"
        lines.append(f"  ZeRO {stage[-1]:<11}{cells}{_bytes(row['activations']):>14}{_bytes(row['total']):>12}{mark}")
    lines.append("* an estimate, with experts evenly loaded; library buffers come on top")
    return "\n".join(line.rstrip() for line in lines)


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _layout(parallel: dict[str, int]) -> str:
    return ", ".join(f"{name} {degree}" for name, degree in parallel.items())


def _scaled(value: int) -> str:
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value // 10 ** (power - 2) / 100:.2f} {prefix}"
    return f"{value} "


def _bytes(value: int) -> str:
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 1 << power:
            return f"{(value >> (power - 10)) / 1024:.1f} {unit}"
    return f"{value} B"
