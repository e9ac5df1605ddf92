"""What will run and what it costs, as one dictionary for scripts and one page for people."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from stablemoe_ds.config.batch_plan import batch_plan
from stablemoe_ds.config.cautions import cautions
from stablemoe_ds.config.costs import flops_per_token, parameters
from stablemoe_ds.config.idle_settings import idle_text
from stablemoe_ds.config.memory import memory_per_rank
from stablemoe_ds.config.rules import switch_step
from stablemoe_ds.config.schema import ParallelConfig, RunConfig
from stablemoe_ds.config.text_table import aligned

MEANINGS = {
    "shared": "all of the above",
    "expert": "routed experts",
    "router": "centroids, and what gates learn",
    "distilled": "routers of ids, gone after the switch",
    "active": "shared, and the experts of one token",
    "total": "",
}
COMPONENTS = ("embedding", "output", "positions", "attention", "ffn", "norms", "shared_experts")


def report(run: RunConfig, world_size: int | None = None) -> dict[str, Any]:
    """Parameters, FLOPs, memory by ZeRO stage and the batch sum; plain numbers, ready for JSON.

    While the vocabulary is not known, ``costs_unknown`` says why what depends on it is left out.
    world_size: processes; None: the fewest the run can have. Expects a run that ``rules.check`` has let pass for
    that many. Raises UserError if the batch does not come out even.
    """
    world_size = world_size or smallest_world(run.parallel)
    plan = batch_plan(run, world_size)
    tokens = run.schedule.steps * run.schedule.tokens_per_step
    facts: dict[str, Any] = {
        "name": run.name,
        "world_size": world_size,
        "training": {"tokens": tokens, "steps": run.schedule.steps, "switch_step": switch_step(run)},
        "batch": {**asdict(plan), "sequence_length": run.data.sequence_length},
        "parallel": {
            "data": plan.data_parallel,
            "tensor": run.parallel.tensor,
            "expert": run.parallel.expert,
            "sequence": run.parallel.sequence,
        },
        "zero_stage": run.parallel.zero_stage,
        "notes": [] if (idle := idle_text(run.moe)) is None else [idle],
    }
    if run.model.vocab_size is None:
        reason = f"model.vocab_size is null and the tokenizer {run.data.tokenizer} cannot be read here"
        return facts | {"costs_unknown": reason}
    counts, flops = parameters(run), flops_per_token(run)
    memory = memory_per_rank(run, plan, world_size)
    facts["training"]["flops"] = tokens * flops
    return facts | {
        "parameters": {
            **{name: getattr(counts, name) for name in ("shared", "expert", "router", "distilled", "active", "total")},
            "components": {name: getattr(counts, name) for name in COMPONENTS},
        },
        "flops_per_token": flops,
        "causal_flops_per_token": flops_per_token(run, causal=True),
        "forward_macs_per_token": flops // 6,
        "memory_per_rank": {f"zero{stage}": {**asdict(m), "total": m.total} for stage, m in memory.items()},
        "warnings": cautions(run, world_size),
    }


def smallest_world(parallel: ParallelConfig) -> int:
    """The fewest processes that tensor, sequence and expert parallelism allow."""
    return math.lcm(parallel.tensor * parallel.sequence, parallel.expert)


def render(facts: dict[str, Any]) -> str:
    """A report as text, with the files of the run if they are among the facts."""
    parts = [
        f"{facts['name']} on {_processes(facts['world_size'])}: {_layout(facts['parallel'])}, "
        f"ZeRO {facts['zero_stage']}",
        _parameters(facts) if "parameters" in facts else f"costs are left out: {facts['costs_unknown']}",
        _training(facts),
    ]
    if "memory_per_rank" in facts:
        parts.append(_memory(facts))
    if facts.get("files"):
        parts.append(aligned([[file["key"], file["path"], file["state"], file["found"]] for file in facts["files"]]))
    parts += facts["notes"]
    if facts.get("warnings"):
        parts.append("\n".join(f"WARNING: {text}" for text in facts["warnings"]))
    return "\n\n".join(parts)


def _parameters(facts: dict[str, Any]) -> str:
    counts = facts["parameters"]
    rows = [["parameters", "", ""]]
    rows += [[f"  {name.replace('_', ' ')}", f"{value:,}", ""] for name, value in counts["components"].items() if value]
    rows += [[name, f"{counts[name]:,}", meaning] for name, meaning in MEANINGS.items()]
    return aligned(rows, right={1})


def _training(facts: dict[str, Any]) -> str:
    training, batch = facts["training"], facts["batch"]
    rows = []
    in_all = ""
    if "flops_per_token" in facts:
        macs = f"forward {_scaled(facts['forward_macs_per_token'])}MACs"
        rows.append(["training FLOPs per token", f"{facts['flops_per_token']:,}", macs])
        causal = f"{facts['causal_flops_per_token']:,}"
        rows.append(["  with a causal mask", causal, "half of attention's pairs are masked"])
        in_all = f"{_scaled(training['flops'])}FLOPs in all"
    stages = f"stage 2 from update {training['switch_step'] + 1}" if training["switch_step"] else ""
    cut = (
        f"= {batch['sequence_length']} a sequence x {batch['micro_batch']} a micro-batch x {batch['accumulation']} "
        f"accumulated x {batch['data_parallel']} ranks"
    )
    rows += [
        ["tokens", f"{training['tokens']:,}", in_all],
        ["updates", f"{training['steps']:,}", stages],
        ["tokens per update", f"{batch['tokens_per_step']:,}", cut],
    ]
    return aligned(rows, right={1})


def _memory(facts: dict[str, Any]) -> str:
    columns: tuple[str, ...] = ("weights", "gradients", "optimizer", "activations", "total")
    if any(row["host"] for row in facts["memory_per_rank"].values()):
        columns += ("host",)
    rows = [["memory of a rank", *(f"{name}*" if name == "activations" else name for name in columns), ""]]
    for stage, row in facts["memory_per_rank"].items():
        mark = "(this run)" if stage == f"zero{facts['zero_stage']}" else ""
        rows.append([f"  ZeRO {stage[-1]}", *(_bytes(row[name]) for name in columns), mark])
    return (
        aligned(rows, right=set(range(1, len(columns) + 1)))
        + "\n* an estimate, with experts evenly loaded; library buffers come on top"
    )


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _layout(parallel: dict[str, int]) -> str:
    return ", ".join(f"{name} {degree}" for name, degree in parallel.items() if degree > 1 or name != "sequence")


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
