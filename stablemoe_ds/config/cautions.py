"""Settings that are allowed but probably not intended: each gives a warning before a run begins, none is refused.

What cannot work is refused by ``rules.check``; here is what works and quietly trains something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stablemoe_ds.config.batch_plan import batch_plan
from stablemoe_ds.config.messages import show
from stablemoe_ds.config.rules import probe_every, two_stages
from stablemoe_ds.config.schema import RunConfig


def cautions(run: RunConfig, world_size: int) -> list[str]:
    """One line for each setting that degenerates.

    Expects a run that ``rules.check`` has let pass for ``world_size``.
    """
    return [*_experts(run), *_shares(run, world_size), *_plateau(run), *_sizes(run)]


def _caution(key: str, value: Any, consequence: str, advice: object) -> str:
    return f"{key}: got {show(value)}: {consequence}; consider {advice}"


def _experts(run: RunConfig) -> Iterator[str]:
    moe = run.moe
    if not moe.facts.routed:
        return
    if moe.experts == 1:
        yield _caution(
            "moe.experts", 1, "there is nothing to route, and a balance loss is always 0", "moe.router dense_wider"
        )
    elif moe.top_k == moe.experts:
        yield _caution(
            "moe.top_k", moe.top_k, "every expert serves every token, so routing decides nothing", moe.experts // 2
        )
    learns = moe.has_centroids and not moe.facts.fixed
    if learns and not moe.normalizes_input and run.model.embedding != "scaled":
        reason = "with model.embedding plain tokens look alike to the centroids, and a few experts take most of them"
        yield _caution("moe.router_input", "raw", reason, "normalized, or model.embedding scaled")
    if moe.facts.balanced_by_bias and moe.bias_step >= 1:
        reason = "affinities lie between 0 and 1, so after one update only the bias chooses"
        yield _caution("moe.bias_step", moe.bias_step, reason, 0.001)


def _shares(run: RunConfig, world_size: int) -> Iterator[str]:
    """What an expert is given of one micro-batch."""
    moe, factor = run.moe, run.moe.capacity_factor
    if not moe.facts.routed or moe.experts == 1:
        return
    rank_tokens = batch_plan(run, world_size).micro_batch * run.data.sequence_length // run.parallel.sequence
    # The ranks of an expert-parallel group share their tokens; those of a tensor-parallel group have the same ones.
    group_tokens = rank_tokens * run.parallel.expert / run.parallel.tensor
    if factor is not None:
        mean = group_tokens * moe.top_k / moe.experts
        if factor * mean < 1:
            reason = (
                f"an expert's share of {group_tokens:g} tokens is {factor * mean:.2g}, less than one; "
                "each expert takes one token, and many may be dropped"
            )
            yield _caution("moe.capacity_factor", factor, reason, f"{1 / mean:.3g} or more, or a larger micro-batch")
        elif factor < 1:
            reason = f"even at a perfectly even load {1 - factor:.0%} of the choices are dropped"
            yield _caution("moe.capacity_factor", factor, reason, "1 or more, or null")
    if moe.facts.by_micro_batch and rank_tokens * moe.top_k < moe.experts:
        reason = f"router '{moe.router}' shares out {rank_tokens} tokens at a time: not every expert can have one"
        yield _caution("moe.experts", moe.experts, reason, f"a micro-batch of {moe.experts} tokens or more")


def _plateau(run: RunConfig) -> Iterator[str]:
    plateau, steps = run.stages.plateau, run.schedule.steps
    if plateau is None or not two_stages(run):
        return
    latest, every = round(plateau.latest * steps), probe_every(run)
    if latest >= steps:
        reason = "a run whose routing never settles ends in stage 1, with nothing frozen"
        yield _caution("stages.plateau.latest", plateau.latest, reason, 0.5)
    if plateau.window >= latest:
        reason = f"nothing can be level over as many updates before update {latest}, where the switch comes in any case"
        yield _caution("stages.plateau.window", plateau.window, reason, max(1, latest // 4))
    elif 2 * every > plateau.window:
        reason = f"a window of {plateau.window} updates needs three records of the probe set and has one every {every}"
        yield _caution("logging.probe_every", run.logging.probe_every, reason, max(1, plateau.window // 4))
    if plateau.tolerance >= 1:
        reason = "agreement and churn lie between 0 and 1, so anything is level"
        yield _caution("stages.plateau.tolerance", plateau.tolerance, reason, 0.01)


def _sizes(run: RunConfig) -> Iterator[str]:
    length, steps, logging = run.data.sequence_length, run.schedule.steps, run.logging
    if run.model.dropout > 0.5:
        yield _caution("model.dropout", run.model.dropout, "more is zeroed than is kept", 0.1)
    if length == 1:
        yield _caution("data.sequence_length", 1, "no token has another to look back at", 1024)
    if 2 * run.schedule.warmup_steps > steps:
        reason = f"the learning rate is at its peak after more than half of {steps} updates"
        yield _caution("schedule.warmup_steps", run.schedule.warmup_steps, reason, steps // 10)
    if logging.eval_tokens is not None and logging.eval_tokens < length:
        reason = f"validation predicts less than one sequence of {length} tokens"
        yield _caution("logging.eval_tokens", logging.eval_tokens, reason, f"{100 * length}, or null")
    if run.moe.facts.routed and logging.probe_tokens < run.moe.experts:
        reason = f"the probe set has fewer tokens than there are experts ({run.moe.experts}), so its load says nothing"
        yield _caution("logging.probe_tokens", logging.probe_tokens, reason, 16_384)
    if run.faults.spike_factor is not None and run.faults.spike_window >= steps:
        reason = f"spikes are looked for after as many kept updates, and the run has {steps}"
        yield _caution("faults.spike_window", run.faults.spike_window, reason, max(1, steps // 10))
