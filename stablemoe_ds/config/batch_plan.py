"""Sizes of a batch: tokens of an update = sequence length x data-parallel ranks x micro-batch x accumulation."""

from __future__ import annotations

from dataclasses import dataclass

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """How the tokens of one update are divided.

    data_parallel: ranks that see different sequences; sequence: how many ranks share each of these.
    micro_batch: sequences a rank handles at once, whole or its part of them.
    accumulation: micro-batches of a rank in one update. sequences_per_step, tokens_per_step: over all ranks.
    """

    data_parallel: int
    micro_batch: int
    accumulation: int
    sequences_per_step: int
    tokens_per_step: int
    sequence: int = 1

    @property
    def weight_copies(self) -> int:
        """Ranks that hold the same dense weights, and over which ZeRO shards."""
        return self.data_parallel * self.sequence


def batch_plan(run: RunConfig, world_size: int) -> BatchPlan:
    """Cut an update's tokens over ``world_size`` processes. Raises UserError if they do not come out even."""
    tensor, sequence = run.parallel.tensor, run.parallel.sequence
    one = tensor * sequence
    if world_size < 1 or world_size % one:
        degrees = f"parallel.tensor {tensor}" + (f" x parallel.sequence {sequence}" if sequence > 1 else "")
        near = nearest_multiple(world_size, one)
        raise UserError(f"world size: got {world_size}: expected a multiple of {degrees}; nearest that works: {near}")
    ranks, length, tokens = world_size // one, run.data.sequence_length, run.schedule.tokens_per_step
    micro = run.parallel.micro_batch
    unit = length * ranks * (micro or 1)
    if tokens % unit:
        share = tokens // (length * ranks)
        other = (
            f", or parallel.micro_batch {nearest_divisor(share, micro)}"
            if micro and tokens % (length * ranks) == 0
            else ""
        )
        raise UserError(
            f"schedule.tokens_per_step: got {tokens}: expected a multiple of data.sequence_length {length} x "
            f"data-parallel ranks {ranks} x parallel.micro_batch {micro or 'null (1)'} = {unit}; "
            f"nearest that works: {nearest_multiple(tokens, unit)}{other}"
        )
    share = tokens // (length * ranks)
    return BatchPlan(ranks, micro or share, share // (micro or share), share * ranks, tokens, sequence)


def nearest_multiple(value: int, unit: int) -> int:
    """The positive multiple of ``unit`` closest to ``value``."""
    return max(1, (2 * value + unit) // (2 * unit)) * unit


def nearest_divisor(whole: int, value: int) -> int:
    """The divisor of ``whole`` closest to ``value``, the larger of two; 1 if none is within 10 000."""
    value = min(value, whole)
    for distance in range(10_000):
        for candidate in (value + distance, value - distance):
            if candidate > 0 and whole % candidate == 0:
                return candidate
    return 1
