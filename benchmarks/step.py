"""The training step of a whole model: stage 1, stage 2, Switch through DeepSpeed's MoE layer, and dense.

All train the same backbone on the same tokens with this package's engine and loader: read, forward, backward, reduce,
clip, update, and sum up for the log. They share one set of processes and take turns, step by step. The dense model
has a feed-forward layer of equal FLOPs in place of the experts. The learning rate is close to zero, so that all
models stay the same: their losses are compared at every step before anything is reported.

Collectives and host waits are counted for one update of rank 0, in the thread that trains; the planner's thread has
its own column. On a CPU nothing waits for a device, so the calls are counted that would (item, bool, tolist, cpu,
nonzero); some of them are on tensors that are on the host everywhere. "waiting" is the share of a step spent waiting
for the loader or the planner.

MFU counts 6 FLOPs per active weight of a matrix product (with the output matrix, without the embedding lookup) and 12
x blocks x width x sequence for attention, relative to the device's peak: from its data sheet, or measured if it has
none. The bounds are these FLOPs divided by the measured rate of a large matrix product, and the bytes of weights,
gradients and optimizer state that must be moved (without activations) divided by the measured rate of a copy. On one
GPU the models do not fit together, so each has its own process there, and only those of one engine take turns. There
are more of them there: with compiled blocks and, in stage 2, a compiled MoE layer (parallel.compile), and stage 1 with
a balance loss that is counted by micro-batch, which saves it a pass (moe.balance_over). A model that fails has no row;
the reason is below the tables.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from benchmarks.common import markdown, parser, publish, ratios, record
from benchmarks.contestants import GPU, KINDS, LAPTOP, QUICK, Shape, Task, compare_losses, measure
from benchmarks.corpus import Corpus, library_text, make_corpus
from benchmarks.counting import listed
from benchmarks.ranks import on_ranks, reason

Row = dict[str, Any]
BRACKETS = (
    ("stage 1", "stage 1, balanced by micro-batch", "stage 2"),
    ("stage 2, compiled",),
    ("deepspeed capacity 1",),
    ("dense",),
    ("dense, compiled",),
    ("deepspeed dropless",),
)
"""Of a GPU: those in one bracket share an engine. What has not been measured so far comes first."""
ON_CPU = ("dense", "stage 1", "stage 2", "deepspeed capacity 1", "deepspeed dropless")


def rows_of(
    ranks: int, shape: Shape, corpus: Corpus, folder: str, rounds: int, profiled: bool, chosen: Sequence[str]
) -> Iterator[Row]:
    """All contestants at this number of processes: side by side, or one after the other where memory is a GPU's.

    Gives the row as far as it is known, each time more of it is. One that fails has a reason in place of figures.
    """
    brackets = BRACKETS if torch.cuda.is_available() else (tuple(chosen),)
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for bracket in brackets:
        names = tuple(name for name in bracket if name in chosen)
        if not names:
            continue
        try:
            figures = on_ranks(ranks, measure, Task(ranks, names, shape, corpus, folder, rounds, profiled))
            compare_losses({name: one["losses"] for name, one in (found | figures).items()})
            found |= figures
        except ChildFailedError as error:
            failed |= dict.fromkeys(names, reason(error))
        except AssertionError as error:
            failed |= dict.fromkeys(names, f"another loss: {str(error).strip().splitlines()[-1]}")
        yield _row(ranks, found, failed)


def _row(ranks: int, found: dict[str, Any], failed: dict[str, str]) -> Row:
    seconds = {name: figures["every_second"] for name, figures in found.items()}
    to_dense = ratios(seconds, "dense") if "dense" in seconds else {}
    left_out = ("losses", "every_second")
    contestants = {
        name: {"ratio_to_dense": to_dense.get(name), **{key: f[key] for key in f if key not in left_out}}
        for name, f in found.items()
    }
    gain = ratios(seconds, "stage 2")["stage 1"] if {"stage 1", "stage 2"} <= seconds.keys() else None
    return {"processes": ranks, "stage_1_to_stage_2": gain, "contestants": contestants, "failed": failed}


def tables(rows: list[dict[str, Any]]) -> str:
    """Times, what planning ahead gains, and what was counted."""
    head = [
        "processes",
        "model",
        "ms a step",
        "/ dense",
        "tokens/s",
        "waiting",
        "MFU",
        "/ matrix bound",
        "/ copy bound",
        "peak, GB",
    ]
    times, numbers = [], []
    for row in rows:
        for name, f in row["contestants"].items():
            took = f["seconds"]
            bounds = [f"{took / f['matrix_bound']:.2f}", f"{took / f['copy_bound']:.1f}"]
            shares = [f"{f['tokens_per_second']:,.0f}", f"{f['waiting']:.1%}", f"{f['mfu']:.1%}"]
            where = [str(row["processes"]), name]
            peak = f"{f['peak_bytes'] / 1e9:.1f}" if f["peak_bytes"] else ""
            times.append(
                [
                    *where,
                    f"{1000 * took:.1f}",
                    f"{f['ratio_to_dense']:.2f}" if f["ratio_to_dense"] else "",
                    *shares,
                    *bounds,
                    peak,
                ]
            )
            counts = [f["collectives"], f.get("planner_collectives", {}), f["host_waits"]]
            numbers.append([*where, *(listed(count) for count in counts)])
    gains = [[str(r["processes"]), f"{r['stage_1_to_stage_2']:.2f}"] for r in rows if r["stage_1_to_stage_2"]]
    counted_head = ["processes", "model", "collectives an update", "in the planner's thread", "host waits"]
    parts = [(head, times), (["processes", "speed of stage 2 / stage 1"], gains), (counted_head, numbers)]
    reasons = [f"{name} failed: {reason}" for row in rows for name, reason in row["failed"].items()]
    return "\n\n".join([*(markdown(*part) for part in parts), *reasons])


def main() -> None:
    options = parser(__doc__, rounds=15)
    options.add_argument("--profile", type=Path, metavar="FILE", help="write what an update spends its time with")
    options.add_argument(
        "--models", nargs="+", choices=KINDS, metavar="NAME", help="default: all; on a CPU, uncompiled"
    )
    options.add_argument("--processes", type=int, nargs="+", help="default: 1 2 4, and on a GPU 1")
    arguments = options.parse_args()
    cuda = torch.cuda.is_available()
    models = arguments.models or (list(KINDS) if cuda else ON_CPU)
    shape = QUICK if arguments.quick else GPU if cuda else LAPTOP
    processes = arguments.processes or ([1] if cuda else [1, 2] if arguments.quick else [1, 2, 4])
    with tempfile.TemporaryDirectory() as folder:
        text = library_text(200_000 if arguments.quick else 2_000_000 if cuda else 4_000_000)
        corpus = make_corpus(Path(folder), text, min(shape.vocab_size, LAPTOP.vocab_size))
        done: list[Row] = []
        for ranks in processes:
            profiled = arguments.profile is not None
            for row in rows_of(ranks, shape, corpus, folder, arguments.rounds, profiled, models):
                if arguments.profile:
                    arguments.profile.write_text(profiles(row))
                rows = [*done, row]
                record(arguments, __doc__, {"shape": asdict(shape), "rows": rows}, tables(rows))
            done = rows
    publish(arguments, __doc__, {"shape": asdict(shape), "rows": done}, tables(done))


def profiles(row: Row) -> str:
    """The profiler's tables of a row, taken out of it."""
    found = {name: figures.pop("profile") for name, figures in row["contestants"].items()}
    return "\n".join(f"{name}\n\n{table}\n" for name, table in found.items() if table)


if __name__ == "__main__":
    main()
