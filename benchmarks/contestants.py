"""Models that make the same update in different ways, side by side: what benchmarks.step times and counts."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import clock, take_turns
from benchmarks.corpus import Corpus
from benchmarks.counting import Counts, counted
from benchmarks.rates import copy_rate, least_bytes, matrix_rate
from benchmarks.switch import switch_gpt
from stablemoe_ds.config.batch_plan import batch_plan
from stablemoe_ds.config.costs import flops_per_token, parameters
from stablemoe_ds.config.routers import ROUTERS
from stablemoe_ds.config.rules import check
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.run_data import RunData
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.model import initialize
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.fixed import TableRouting, freeze
from stablemoe_ds.routing.source import LEARNED
from stablemoe_ds.training.engine import Engine
from stablemoe_ds.training.planner import Planner
from stablemoe_ds.training.routed_batch import RoutedBatch
from stablemoe_ds.training.throughput import peak_flops
from stablemoe_ds.training.update_figures import UpdateFigures

COUNTED = 2
"""Updates in which is counted instead of timed; the first of them warms up."""


@dataclass(frozen=True)
class Kind:
    """What a contestant is. Those that differ in nothing but stage 2 and balance_over share an engine, as in a run.

    router: dense_deeper with one expert is the dense model of equal FLOPs. follows: it is in stage 2. options: of
    DeepSpeed's MoE layer, in place of ours.
    """

    router: str
    follows: bool = False
    balance_over: str = "update"
    compiled: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def engine(self) -> Kind:
        """Equal for contestants that share an engine."""
        return replace(self, follows=False, balance_over="update")


KINDS = {
    "dense": Kind("dense_deeper"),
    "dense, compiled": Kind("dense_deeper", compiled=True),
    "stage 1": Kind("stablemoe"),
    "stage 1, balanced by micro-batch": Kind("stablemoe", balance_over="micro_batch"),
    "stage 2": Kind("stablemoe", follows=True),
    "stage 2, compiled": Kind("stablemoe", follows=True, compiled=True),
    "deepspeed capacity 1": Kind("switch", options=(("capacity_factor", 1.0),)),
    "deepspeed dropless": Kind("switch", options=(("drop_tokens", False),)),
}
PROFILED = ("stage 1", "stage 2", "stage 2, compiled")

PAPER = {"positions": "learned", "norm": "layernorm", "activation": "relu", "bias": True, "embedding": "scaled"}


@dataclass(frozen=True)
class Shape:
    """The backbone, where its experts are, and the tokens of an update over all ranks.

    micro: sequences a rank handles at once; None: its whole share.
    """

    hidden_size: int
    layers: int
    heads: int
    vocab_size: int
    moe_layers: tuple[int, ...]
    experts: int
    sequence: int
    tokens: int
    dtype: str
    micro: int | None = None


QUICK = Shape(64, 2, 4, 512, (1, 2), 8, 64, 512, "fp32")
LAPTOP = Shape(256, 4, 4, 4096, (2, 4), 8, 128, 2048, "fp32")
# 1.4 B active of 2.4 B parameters. At 18 bytes each (bf16 weight; fp32 gradient, master weight and two moments) that is
# 43 GB; the activations of 8 192 tokens take about 10 GB more.
GPU = Shape(2048, 24, 16, 32768, (6, 12, 18, 24), 8, 2048, 32768, "bf16", micro=4)


@dataclass(frozen=True)
class Task:
    """What a set of processes is to do."""

    ranks: int
    names: tuple[str, ...]
    shape: Shape
    corpus: Corpus
    folder: str
    rounds: int
    profiled: bool = False


def run_of(task: Task, kind: Kind, zero_stage: int = 1) -> RunConfig:
    """A run of this shape."""
    s, router = task.shape, kind.router
    dense = not ROUTERS[router].routed
    run = RunConfig.model_validate(
        {
            "run_dir": task.folder,
            "model": {
                **{name: vars(s)[name] for name in ("layers", "hidden_size", "heads", "vocab_size")},
                "ffn_hidden_size": 4 * s.hidden_size,
                **PAPER,
            },
            "moe": {
                "router": router,
                "router_input": "raw",
                "layers": list(s.moe_layers),
                "experts": 1 if dense else s.experts,
                "balance_over": kind.balance_over,
            },
            "data": {"tokenizer": task.corpus.tokenizer, "train": task.corpus.prefix, "sequence_length": s.sequence},
            "optimizer": {"lr": 1e-9},
            "schedule": {"steps": task.rounds + 10, "tokens_per_step": s.tokens},
            "stages": {"at_step": 1} if ROUTERS[router].distilled else {},
            "parallel": {
                "expert": 1 if dense else task.ranks,
                "micro_batch": s.micro,
                "zero_stage": zero_stage,
                "compile": kind.compiled,
            },
            "precision": {"dtype": s.dtype},
        }
    )
    check(run, task.ranks)
    return run


class CountedPlanner(Planner):
    """A planner that counts what its thread does for all its plans."""

    def __init__(self, *args: Any) -> None:
        self.plans, self.counts = 0, Counts()
        super().__init__(*args)

    def _plan(self, number: int, batches: list[Batch]) -> list[RoutedBatch]:
        with counted(torch.device("cpu")) as counts:
            planned = super()._plan(number, batches)
        self.plans += 1
        self.counts.collectives += counts.collectives
        return planned


class Contestant:
    """One way to make the same update: an engine, what of the run it goes by, and what feeds it.

    waited: seconds of each step in which no batch was there.
    """

    def __init__(self, run: RunConfig, engine: Engine, data: RunData, table: TableRouting | None) -> None:
        self.run, self.engine, self.data, self.table = run, engine, data, table
        self.device = engine.groups.world.device
        self.planner: Planner | None = None
        self.waited: list[float] = []
        self._figures: list[UpdateFigures] = []

    def start(self, planner: type[Planner] = Planner) -> None:
        """Begin at the first update of the data."""
        loader = self.data.train.updates(self.data.train.start(), self.engine.run.schedule.steps)
        self.waited, self._figures = [], []
        self._feed: Iterator[list[RoutedBatch]] = ([RoutedBatch(batch) for batch in step] for step in loader)
        if self.table is not None:
            self.planner = planner(loader, self.table.table, self.engine.groups, self.engine.run.parallel)
            self._feed = iter(self.planner)

    def close(self) -> None:
        if self.planner is not None:
            self.planner.close()

    def step(self) -> float:
        """One update; the seconds it took on this rank, from the moment all ranks were ready."""
        dist.barrier()
        began = clock(self.device)
        routed = next(self._feed)
        self.waited.append(clock() - began)
        self.update(routed)
        return clock(self.device) - began

    def update(self, routed: list[RoutedBatch]) -> None:
        """What the trainer does once it has a batch."""
        engine = self.engine
        engine.run = self.run
        engine.freeze_distilled(self.table is not None)
        engine.set_learning_rate(engine.run.optimizer.lr)
        figures = engine.accumulate(routed, LEARNED, len(self._figures))
        engine.update()
        engine.teach_routers(figures)
        self._figures.append(figures)

    @property
    def losses(self) -> list[float]:
        """Of each step, before its update: nats a token. Collective."""
        return [figures.totals().mean_loss for figures in self._figures]

    def count(self) -> dict[str, Any]:
        """Collectives and host waits of one update, the one before having warmed up."""
        self.start(CountedPlanner)
        for number in range(COUNTED):
            routed = next(self._feed)
            with counted(self.device) if number else nullcontext(Counts()) as counts:
                self.update(routed)
        self.close()
        found: dict[str, Any] = {"collectives": counts.collectives, "host_waits": counts.host_waits}
        if isinstance(self.planner, CountedPlanner):
            each = {kind: n / self.planner.plans for kind, n in self.planner.counts.collectives.items()}
            found["planner_collectives"] = each
        return found


def build(task: Task, groups: Groups) -> dict[str, Contestant]:
    """The contestants of a task."""
    engines: dict[Kind, Engine] = {}
    found = {}
    for name in task.names:
        kind = KINDS[name]
        run = run_of(task, kind)
        if kind.engine not in engines:
            with drawn_on(groups.world.device):
                if kind.options:
                    model = switch_gpt(run, run_of(task, KINDS["dense"]), groups, **dict(kind.options))
                else:
                    model = StableMoEGPT(run, task.shape.vocab_size, groups.placement)
            engines[kind.engine] = Engine(run, batch_plan(run, task.ranks), groups, model)
        engine = engines[kind.engine]
        table = freeze(engine.model.distilled_routers, run.moe.top_k, tuple(run.moe.layers)) if kind.follows else None
        data = RunData(run, engine.plan, groups, Tokenizer(task.corpus.tokenizer))
        found[name] = Contestant(run, engine, data, table if isinstance(table, TableRouting) else None)
    return found


@contextmanager
def drawn_on(device: torch.device) -> Iterator[None]:
    """Inside, start values are drawn on this device: 2.4 G of them take minutes on one CPU thread.

    They follow from the seed and a tensor's name as they do in a run, but are others than those of the CPU.
    """
    if device.type == "cpu":
        yield
        return
    start_value, generator = initialize.start_value, initialize._generator

    def value_there(*arguments: Any) -> Tensor:
        with device:
            return start_value(*arguments)

    def generator_there(seed: int, name: str) -> torch.Generator:
        return torch.Generator(device).manual_seed(generator(seed, name).initial_seed())

    with (
        mock.patch.object(initialize, "start_value", value_there),
        mock.patch.object(initialize, "_generator", generator_there),
    ):
        yield


def profile_of(contestant: Contestant) -> str:
    """Table of what an update spends its time with, by operator, the longest first."""
    activities, key = [ProfilerActivity.CPU], "self_cpu_time_total"
    if contestant.device.type == "cuda":
        activities, key = [*activities, ProfilerActivity.CUDA], "self_cuda_time_total"
    with profile(activities=activities) as recorded:
        contestant.step()
    return str(recorded.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60))


def measure(groups: Groups, task: Task) -> dict[str, Any]:
    """Figures of each contestant, by name."""
    contestants = build(task, groups)
    found = {name: contestant.count() for name, contestant in contestants.items()}
    for contestant in contestants.values():
        contestant.start()
    seconds = take_turns({name: contestant.step for name, contestant in contestants.items()}, task.rounds)
    losses = {name: contestant.losses for name, contestant in contestants.items()}
    compare_losses(losses)
    profiles = {name: profile_of(contestants[name]) for name in PROFILED if task.profiled and name in contestants}
    for contestant in contestants.values():
        contestant.close()
    device, dtype = groups.world.device, task.shape.dtype
    peak, _ = peak_flops(device, dtype)
    matrix, copy = matrix_rate(device, dtype), copy_rate(device)
    for name, contestant in contestants.items():
        run, plan, took = contestant.run, contestant.engine.plan, statistics.median(seconds[name])
        flops = flops_per_token(run) * plan.tokens_per_step / task.ranks
        found[name] |= {
            "seconds": took,
            **({"profile": profiles.get(name, "")} if task.profiled else {}),
            "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
            "every_second": seconds[name],
            "losses": losses[name],
            "tokens_per_second": plan.tokens_per_step / took,
            "waiting": sum(contestant.waited[1:]) / sum(seconds[name]),
            "active_parameters": parameters(run).active,
            "parameters": parameters(run).total,
            "mfu": flops / took / peak,
            "matrix_bound": flops / matrix,
            "copy_bound": least_bytes(run, plan, task.ranks) / copy,
        }
    return found


def compare_losses(losses: dict[str, list[float]]) -> None:
    """Raise AssertionError unless all contestants had the same loss in every step, to 0.1 %."""
    first, *others = losses
    for other in others:
        torch.testing.assert_close(torch.tensor(losses[other]), torch.tensor(losses[first]), rtol=1e-3, atol=0)
