"""One long sequence, trained by one rank that recomputes activations and by four ranks that share it.

An update of stage 1 of a small model on a single sequence: forward, backward and optimizer. Reported are the seconds
of the slowest rank and the processor seconds of all ranks together, both as medians over rounds, and the peak memory
of the fullest rank in addition to weights and gradients. Every rank is a process with one thread, and all share the
cores of this machine: four ranks on two cores can be at most twice as fast as one. If other programs run, compare
processor seconds. All variants have to reach the same loss.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import markdown, parser, publish, timed
from benchmarks.memory import peak_bytes
from benchmarks.ranks import on_every_rank
from stablemoe_ds.config.batch_plan import batch_plan
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.distributed.groups import Groups, start_world, stop_world
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.source import LEARNED
from stablemoe_ds.training.engine import Engine
from stablemoe_ds.training.routed_batch import RoutedBatch

VOCAB = 256
WAYS = {"1 rank, recomputing": (1, True), "4 ranks": (4, False), "4 ranks, recomputing": (4, True)}
"""Ranks that share the sequence, and whether they recompute activations."""


def run_of(tokens: int, sequence: int, recompute: bool) -> RunConfig:
    """Two blocks of width 64, and an MoE layer of 8 experts; one sequence an update."""
    return RunConfig.model_validate(
        {
            "model": {"layers": 2, "hidden_size": 64, "heads": 4, "ffn_hidden_size": 256, "vocab_size": VOCAB},
            "moe": {"layers": [2], "experts": 8},
            "data": {"sequence_length": tokens},
            "optimizer": {"lr": 1e-3},
            "schedule": {"steps": 100, "tokens_per_step": tokens},
            "parallel": {"sequence": sequence, "expert": sequence, "recompute": recompute},
            # Of about the model's size: the usual ones, of 200 MB, would be most of what is measured.
            "deepspeed": {"zero_optimization": {"reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}},
        }
    )


def measure_here(run: RunConfig, rounds: int) -> dict[str, Any]:
    """What a rank does: a first update whose memory is recorded, then timed ones."""
    world = start_world()
    parallel, tokens = run.parallel, run.data.sequence_length
    groups = Groups(world, parallel.tensor, parallel.expert, parallel.sequence)
    model = StableMoEGPT(run, VOCAB, groups.placement)
    engine = Engine(run, batch_plan(run, world.size), groups, model)
    ids = torch.randint(VOCAB, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    every = torch.ones(1, tokens, dtype=torch.bool)
    whole = Batch(ids[:, :-1], ids[:, 1:], every, every)
    mine = [RoutedBatch(whole.part(groups.sequence_rank, groups.sequence))]
    losses: list[float] = []

    def update() -> None:
        engine.set_learning_rate(1e-3)
        losses.append(engine.accumulate(mine, LEARNED, 0).totals().mean_loss)
        engine.update()

    peak = peak_bytes(update, model.parameters(), world.device)
    seconds, processor = [], []
    for _ in range(rounds):
        dist.barrier()
        began = time.process_time()
        seconds.append(timed(update, world.device)())
        processor.append(time.process_time() - began)
    stop_world()
    return {"seconds": seconds, "processor": processor, "peak": peak, "losses": losses}


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    """A row: seconds and bytes of each way."""
    found: dict[str, Any] = {}
    for name, (sequence, recompute) in WAYS.items():
        run = run_of(tokens, sequence, recompute)
        ranks = on_every_rank(run.parallel.sequence, measure_here, run, rounds)
        slowest = [max(took) for took in zip(*(rank["seconds"] for rank in ranks), strict=True)]
        together = [sum(took) for took in zip(*(rank["processor"] for rank in ranks), strict=True)]
        losses = ranks[0]["losses"]
        torch.testing.assert_close(losses, found[next(iter(found))]["losses"] if found else losses, rtol=1e-4, atol=0)
        peak = max(rank["peak"] for rank in ranks)
        found[name] = {
            "seconds": statistics.median(slowest),
            "processor_seconds": statistics.median(together),
            "peak_bytes": peak,
            "losses": losses,
        }
    return {"tokens": tokens, "ways": found}


def tables(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        for name, way in row["ways"].items():
            seconds = f"{way['seconds']:.1f}", f"{way['processor_seconds']:.1f}"
            lines.append([str(row["tokens"]), name, *seconds, f"{way['peak_bytes'] / 2**20:.0f}"])
    return markdown(["tokens", "way", "seconds", "processor seconds", "peak of a rank, MiB"], lines)


def main() -> None:
    arguments = parser(__doc__, rounds=3).parse_args()
    sizes = [1024] if arguments.quick else [8192, 32768]
    rows = [measure(tokens, arguments.rounds) for tokens in sizes]
    publish(arguments, __doc__, {"rows": rows}, tables(rows))


if __name__ == "__main__":
    main()
