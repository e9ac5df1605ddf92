"""Rules across sections of a run, each with its reason and the nearest setting that satisfies it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from stablemoe_ds.config.batch_plan import batch_plan, nearest_divisor, nearest_multiple
from stablemoe_ds.config.compatibility import refused
from stablemoe_ds.config.deepspeed_config import conflicts
from stablemoe_ds.config.messages import breach, show
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError

PROBES_PER_RUN = 50
"""Records of the probe set in a run that does not say how many."""


def check(run: RunConfig, world_size: int | None = None) -> None:
    """Check a run against every rule; those about the number of processes only if ``world_size`` is given.

    Raises UserError with one line for each breach.
    """
    rules = (
        *(_model, _moe, _table, _start_table, _placement, _replicated, _data, _schedule, _stages),
        *(refused, _sharding, _loss_scale, _tensor, _sequence, conflicts),
    )
    found = [line for rule in rules for line in rule(run)]
    if world_size is not None:
        found += _world(run, world_size)
    if found:
        raise UserError("\n".join(found))


def two_stages(run: RunConfig) -> bool:
    """True if a router learns first and is frozen during the run."""
    return run.moe.facts.distilled and not run.stages.never


def switch_step(run: RunConfig) -> int | None:
    """First update that follows fixed routes if the configuration alone decides it; None for ``plateau`` and never."""
    stages = run.stages
    if run.moe.facts.fixed:
        return 0
    if not two_stages(run):
        return None
    if stages.at_fraction is not None:
        return round(stages.at_fraction * run.schedule.steps)
    return stages.at_step


def probe_every(run: RunConfig) -> int:
    """Updates between two records of the probe set."""
    return run.logging.probe_every or max(1, run.schedule.steps // PROBES_PER_RUN)


def with_vocabulary(run: RunConfig, tokenizer_size: int) -> RunConfig:
    """The run with ``model.vocab_size`` filled in from the tokenizer where it is null.

    Raises UserError if a given vocabulary is smaller than the tokenizer's, or cannot be cut over tensor ranks.
    """
    size = run.model.vocab_size
    if size is not None and size < tokenizer_size:
        raise UserError(
            breach("model.vocab_size", size, f"the tokenizer has {tokenizer_size} ids", f"{tokenizer_size}, or null")
        )
    if size is None:
        run = run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": tokenizer_size})})
    if found := list(_cut_vocabulary(run)):
        raise UserError("\n".join(found))
    return run


def with_document_end(run: RunConfig, eos_id: int | None) -> RunConfig:
    """The run with ``data.eos_id`` filled in from the tokenizer where it is null and documents are kept apart.

    eos_id: the tokenizer's; None without one. Raises UserError if nothing says where a document ends.
    """
    data = run.data
    if data.document_mask == "none" or data.eos_id is not None:
        return run
    if eos_id is None:
        reason = "nothing says which id ends a document"
        raise UserError(breach("data.eos_id", None, reason, "the id, or the tokenizer's file in data.tokenizer"))
    return run.model_copy(update={"data": data.model_copy(update={"eos_id": eos_id})})


def _model(run: RunConfig) -> Iterator[str]:
    m = run.model
    if m.hidden_size % m.heads:
        near = nearest_divisor(m.hidden_size, m.heads)
        yield breach("model.heads", m.heads, f"expected a divisor of model.hidden_size {m.hidden_size}", near)
    elif m.positions == "rope" and m.hidden_size // m.heads % 2:
        reason = f"rotary positions turn pairs, but a head has {m.hidden_size // m.heads} dimensions, which is odd"
        even = nearest_multiple(m.hidden_size, 2 * m.heads)
        yield breach("model.positions", m.positions, reason, f"learned, or model.hidden_size {even}")
    if m.kv_heads and m.heads % m.kv_heads:
        near = nearest_divisor(m.heads, m.kv_heads)
        yield breach("model.kv_heads", m.kv_heads, f"expected a divisor of model.heads {m.heads}", near)
    if m.vocab_size is None and run.data.tokenizer is None:
        reason = "without data.tokenizer nothing says how many ids there are"
        yield breach("model.vocab_size", None, reason, "the tokenizer's file in data.tokenizer")


def _moe(run: RunConfig) -> Iterator[str]:
    moe, expert = run.moe, run.parallel.expert
    if moe.layers and moe.layers[-1] > run.model.layers:
        reason = f"expected block numbers from 1 to model.layers {run.model.layers}"
        inside = [block for block in moe.layers if block <= run.model.layers] or [run.model.layers]
        yield breach("moe.layers", moe.layers, reason, show(inside))
    if moe.capacity_factor is not None and run.parallel.dispatch_parts > 1:
        reason = "with moe.capacity_factor an expert's share is of the tokens of a whole micro-batch"
        yield breach("parallel.dispatch_parts", run.parallel.dispatch_parts, reason, 1)
    if not moe.facts.routed and expert > 1:
        yield breach("parallel.expert", expert, f"router '{moe.router}' has no experts to spread", 1)
    elif moe.facts.routed and moe.experts % expert:
        near = nearest_divisor(moe.experts, expert)
        yield breach("parallel.expert", expert, f"expected a divisor of moe.experts {moe.experts}", near)


def _table(run: RunConfig) -> Iterator[str]:
    """A table is named only where layers follow it: otherwise the run would learn what it was meant to be given."""
    moe = run.moe
    if moe.table is None or moe.needs_table:
        return
    ways = ["null"]
    if moe.layers:
        ways.append("moe.router table, to follow it in every MoE layer")
    if moe.facts.routed and not moe.facts.fixed:
        if len(moe.layers) > 1:
            ways.append(f"moe.table_layers {moe.layers[:1]}, to follow it there")
        ways.append("moe.start_table instead, to start from it")
    yield breach("moe.table", moe.table, f"router '{moe.router}' does not follow it", "; or ".join(ways))


def _start_table(run: RunConfig) -> Iterator[str]:
    """A router can start from a table if it learns routes, and a distilled one only if it can be a table."""
    moe = run.moe
    if moe.start_table is None:
        return
    if not moe.facts.routed or moe.facts.fixed:
        near = "null, or moe.router table and moe.table" if moe.facts.fixed else "null"
        yield breach("moe.start_table", moe.start_table, f"router '{moe.router}' learns no routes", near)
    elif moe.table_layers:
        reason = "a start is for all MoE layers, and those of moe.table_layers follow moe.table"
        yield breach("moe.start_table", moe.start_table, reason, "null, or moe.table_layers []")
    elif moe.facts.distilled and moe.distilled.kind != "word":
        reason = f"a {moe.distilled.kind} router sees more than the id, so no table says what it chooses at the start"
        yield breach("moe.start_table", moe.start_table, reason, "null, or moe.distilled.kind word")


def _placement(run: RunConfig) -> Iterator[str]:
    """Experts can be placed by their load where a table says beforehand what it will be."""
    moe, placement = run.moe, run.parallel.expert_placement
    if placement == "number" or moe.facts.fixed or (two_stages(run) and moe.distilled.kind == "word"):
        return
    expected = f"router '{moe.router}' never follows a table, so what each expert will serve is not known beforehand"
    if two_stages(run):
        expected = f"{moe.distilled.kind} routers never become a table, so what each expert will serve is not known"
    yield breach("parallel.expert_placement", placement, expected, "number")


def _replicated(run: RunConfig) -> Iterator[str]:
    """Experts are replicated where it is known which of them serve most, and each copy decides alone what it serves."""
    moe, replicated = run.moe, run.parallel.replicated_experts
    key = "parallel.replicated_experts"
    if replicated and run.parallel.expert_placement == "number":
        reason = "with parallel.expert_placement number nothing says which experts serve most tokens"
        yield breach(key, replicated, reason, "0, or parallel.expert_placement load")
    if replicated and moe.capacity_factor is not None:
        reason = "with moe.capacity_factor an expert takes a share of all ranks' tokens, and no copy sees them all"
        yield breach(key, replicated, reason, "0, or moe.capacity_factor null")
    if replicated >= moe.experts:
        reason = f"expected fewer than moe.experts {moe.experts}, as at least one is spread over the ranks"
        yield breach(key, replicated, reason, f"{moe.experts - 1}, or parallel.expert 1")


def _data(run: RunConfig) -> Iterator[str]:
    data, vocab = run.data, run.model.vocab_size
    if data.document_mask != "none" and data.eos_id is None and data.tokenizer is None:
        reason = "documents are kept apart, but nothing says which id ends one"
        yield breach("data.eos_id", None, reason, "the id, or data.document_mask none")
    if data.eos_id is not None and vocab is not None and data.eos_id >= vocab:
        yield breach("data.eos_id", data.eos_id, f"expected an id below model.vocab_size {vocab}", "null")


def _schedule(run: RunConfig) -> Iterator[str]:
    warmup, steps = run.schedule.warmup_steps, run.schedule.steps
    if warmup >= steps and warmup:
        yield breach("schedule.warmup_steps", warmup, f"expected fewer than schedule.steps {steps}", steps // 10)


def _stages(run: RunConfig) -> Iterator[str]:
    """Only for routers that are distilled: the others have one stage, so that one file serves to compare them all."""
    stages, steps = run.stages, run.schedule.steps
    given = [key for key in ("at_step", "at_fraction", "plateau") if getattr(stages, key) is not None]
    if not run.moe.facts.distilled:
        return
    if not given and not stages.never:
        yield (
            f"stages: nothing says when router '{run.moe.router}' is frozen; nearest that works: "
            f"stages.at_fraction 0.1 (the paper's), or stages.never true"
        )
    step = switch_step(run)
    if step is not None and not 1 <= step < steps:
        value = getattr(stages, given[0])
        near = min(max(step, 1), steps - 1)
        advice = f"stages.at_step {near}" if near else "schedule.steps 2"
        yield breach(
            f"stages.{given[0]}", value, f"stage 1 must end inside the run, after 1 to {steps - 1} updates", advice
        )
    if stages.plateau is not None and round(stages.plateau.latest * steps) < 1:
        reason = f"of {steps} updates that is none, so routing would be frozen before it has learned anything"
        yield breach("stages.plateau.latest", stages.plateau.latest, reason, f"{min(1.0, 1 / steps):.3g}")
    if given and run.moe.distill_weight == 0:
        reason = "the distilled router learns nothing, so the switch would freeze noise"
        yield breach("moe.distill_weight", 0, reason, "0.3 (the default), or stages.never true")


def _sharding(run: RunConfig) -> Iterator[str]:
    """What a ``deepspeed`` section may not lay over ZeRO 3."""
    if run.parallel.zero_stage != 3:
        return
    for key in ("zero_hpz_partition_size", "zero_quantized_weights"):
        if key in run.deepspeed.get("zero_optimization", {}):
            value = run.deepspeed["zero_optimization"][key]
            reason = "checkpoints are read from weights and moments that are whole over the ranks' own memory"
            yield breach(f"deepspeed.zero_optimization.{key}", value, reason, "leave it out")


def _loss_scale(run: RunConfig) -> Iterator[str]:
    dtype, scale = run.precision.dtype, run.precision.loss_scale
    if scale and dtype != "fp16":
        yield breach("precision.loss_scale", scale, f"{dtype} needs no loss scale", 0)


def _tensor(run: RunConfig) -> Iterator[str]:
    m, tensor = run.model, run.parallel.tensor
    if tensor == 1:
        return
    parts = {"model.heads": m.heads, "model.kv_heads": m.kv_heads, "model.ffn_hidden_size": m.ffn_hidden_size}
    for key, value in parts.items():
        if value and value % tensor:
            near = f"{nearest_multiple(value, tensor)}, or parallel.tensor {nearest_divisor(value, tensor)}"
            yield breach(key, value, f"expected a multiple of parallel.tensor {tensor}", near)
    yield from _cut_vocabulary(run)


def _sequence(run: RunConfig) -> Iterator[str]:
    """Ranks that share sequences have the same share of positions, and for attention of a tensor rank's heads."""
    tensor, sequence, length = run.parallel.tensor, run.parallel.sequence, run.data.sequence_length
    heads = run.model.heads // tensor
    if sequence == 1 or not heads:
        return
    near = nearest_divisor(math.gcd(length, heads), sequence)
    if length % sequence:
        yield breach("parallel.sequence", sequence, f"expected a divisor of data.sequence_length {length}", near)
    if heads % sequence:
        whose = f"the {heads} heads of a tensor rank" if tensor > 1 else f"model.heads {heads}"
        yield breach("parallel.sequence", sequence, f"expected a divisor of {whose}", near)


def _cut_vocabulary(run: RunConfig) -> Iterator[str]:
    """The vocabulary is never padded silently: extra rows would join the softmax and the parameter count."""
    size, tensor = run.model.vocab_size, run.parallel.tensor
    if size is not None and size % tensor:
        expected = f"expected a multiple of parallel.tensor {tensor}; ids the tokenizer lacks are allowed"
        yield breach("model.vocab_size", size, expected, -(-size // tensor) * tensor)


def _world(run: RunConfig, world_size: int) -> Iterator[str]:
    one, expert = run.parallel.tensor * run.parallel.sequence, run.parallel.expert
    if world_size < 1:
        yield breach("world size", world_size, "expected at least one process", math.lcm(one, expert))
        return
    if world_size % expert:
        near = nearest_divisor(math.gcd(run.moe.experts, world_size), expert)
        reason = f"expected a divisor of the world size {world_size}, as every group of ranks holds all experts"
        yield breach(
            "parallel.expert",
            expert,
            reason,
            f"{near}, or {nearest_multiple(world_size, expert)} processes (torchrun --nproc_per_node "
            f"{nearest_multiple(world_size, expert)} -m stablemoe_ds train ...)",
        )
    try:
        batch_plan(run, world_size)
    except UserError as error:
        yield str(error)
