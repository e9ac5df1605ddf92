"""An update of stage 2 under each ZeRO stage: time, collectives, and what a rank keeps.

The model, tokens and counting of benchmarks.step, with the experts spread over the ranks. The four engines share
one set of processes and take turns, step by step, and have to reach the same losses. Kept bytes are the weights,
gradients and optimizer state that a rank holds between two updates, by the estimate of ``stablemoe config check``,
which tests compare with measurements. All ranks share the cores of this machine and exchange through its memory, so
collectives cost little here; their number is what a network would have to carry.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import markdown, parser, publish, ratios, take_turns
from benchmarks.contestants import KINDS, LAPTOP, QUICK, Contestant, Shape, Task, compare_losses, run_of
from benchmarks.corpus import library_text, make_corpus
from benchmarks.counting import listed
from benchmarks.ranks import on_ranks
from stablemoe_ds.config.batch_plan import batch_plan
from stablemoe_ds.config.memory import memory_per_rank
from stablemoe_ds.data.run_data import RunData
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.routing.fixed import TableRouting, freeze
from stablemoe_ds.training.engine import Engine
from stablemoe_ds.training.sharded_weights import build_model, gathered

STAGES = (0, 1, 2, 3)


def contestant(task: Task, groups: Groups, stage: int) -> Contestant:
    """An engine of this ZeRO stage in stage 2 of training, its updates planned ahead."""
    run = run_of(task, KINDS["stage 2"], zero_stage=stage)
    engine = Engine(run, batch_plan(run, task.ranks), groups, build_model(run, task.shape.vocab_size, groups.placement))
    routers = engine.model.distilled_routers
    with gathered(routers):
        table = freeze(routers, run.moe.top_k, tuple(run.moe.layers))
    assert isinstance(table, TableRouting)
    return Contestant(run, engine, RunData(run, engine.plan, groups, Tokenizer(task.corpus.tokenizer)), table)


def measure(groups: Groups, task: Task) -> dict[str, Any]:
    """Figures by ZeRO stage."""
    contestants = {f"ZeRO {stage}": contestant(task, groups, stage) for stage in STAGES}
    found = {name: one.count() for name, one in contestants.items()}
    for one in contestants.values():
        one.start()
    seconds = take_turns({name: one.step for name, one in contestants.items()}, task.rounds)
    for one in contestants.values():
        one.close()
    compare_losses({name: one.losses for name, one in contestants.items()})
    to_none = ratios(seconds, "ZeRO 0")
    for stage, (name, one) in enumerate(contestants.items()):
        memory = memory_per_rank(one.engine.run, one.engine.plan, task.ranks)[stage]
        found[name] |= {
            "seconds": statistics.median(seconds[name]),
            "ratio": to_none[name],
            "kept_bytes": memory.weights + memory.gradients + memory.optimizer,
        }
    return found


def tables(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        for name, figures in row["stages"].items():
            times = f"{1000 * figures['seconds']:.1f}", f"{figures['ratio']:.2f}"
            kept, counts = f"{figures['kept_bytes'] / 1e6:.1f}", listed(figures["collectives"])
            lines.append([str(row["processes"]), name, *times, kept, counts])
    return markdown(["processes", "stage", "ms a step", "/ ZeRO 0", "kept, MB", "collectives an update"], lines)


def main() -> None:
    options = parser(__doc__, rounds=9)
    options.add_argument("--processes", type=int, nargs="+", help="default: 2 4")
    arguments = options.parse_args()
    shape: Shape = QUICK if arguments.quick else LAPTOP
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder), library_text(200_000 if arguments.quick else 4_000_000), shape.vocab_size)
        for ranks in arguments.processes or ([2] if arguments.quick else [2, 4]):
            task = Task(ranks, (), shape, corpus, folder, arguments.rounds)
            rows.append({"processes": ranks, "stages": on_ranks(ranks, measure, task)})
    publish(arguments, __doc__, {"rows": rows}, tables(rows))


if __name__ == "__main__":
    main()
