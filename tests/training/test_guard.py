"""Numbers that go wrong: the update is dropped by all ranks alike, told with its place, and the run recovers."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stablemoe_ds.config.schema import FaultsConfig, RunConfig
from stablemoe_ds.training.guard import DropWatch, Guard
from stablemoe_ds.training.update_figures import UpdateTotals
from tests.distributed.launch import run_distributed
from tests.training.runs import STEPS, SWITCH, TinyData, checkpoint_of, history, small_run, tensors_of, train_here

EXPERT = "decoder.layers.1.moe.experts.sublayers.0.w1"
DENSE = "decoder.layers.2.mlp.linear_fc1.weight"
NORM = "decoder.layers.2.pre_mlp_layernorm"
PER_STEP = 4
"""Sequences of an update."""
Fault = Callable[[Any, int], Any]
"""Called with the engine and the number of the update (from 1, dropped ones counted) before it begins."""


def poison_gradient(rank: int, updates: tuple[int, ...], name: str, engine: Any, number: int) -> Any:
    """On one rank, let the gradient of a parameter be NaN in these updates."""
    if engine.groups.world.rank == rank and number in updates:
        return dict(engine.model.named_parameters())[name].register_hook(lambda gradient: gradient * math.nan)
    return None


def poison_output(rank: int, updates: tuple[int, ...], name: str, engine: Any, number: int) -> Any:
    """On one rank, let what a module returns be infinite in these updates."""
    if engine.groups.world.rank == rank and number in updates:
        module = dict(engine.model.named_modules())[name]
        return module.register_forward_hook(lambda _module, _args, output: output * math.inf)
    return None


def stop_when_poisoned(updates: tuple[int, ...], engine: Any, number: int) -> Any:
    """Ask for a stop in the first of the updates whose gradient is spoilt."""
    if number == updates[0]:
        signal.raise_signal(signal.SIGTERM)
    return poison_gradient(0, updates, DENSE, engine, number)


def corrupt_weights(update: int, factor: float, engine: Any, number: int) -> None:
    """On every rank, once, multiply what the model computes with: a fault of memory."""
    if number == update:
        with torch.no_grad():
            for parameter in engine.model.parameters():
                parameter.mul_(factor)
                if hasattr(parameter, "ds_tensor"):  # at ZeRO 3 this rank's part of it, too
                    parameter.ds_tensor.mul_(factor)


def train_with(fault: Fault, run: RunConfig) -> tuple[str, list[str]]:
    """What a rank does: train with a fault. Returns what was printed, and names of what dropped updates changed."""
    from stablemoe_ds.training.engine import Engine

    accumulate, update = Engine.accumulate, Engine.update
    hooks: list[Any] = []
    changed: list[str] = []

    def begin(self: Any, *args: Any) -> Any:
        if hooks and hooks[-1] is not None:
            hooks[-1].remove()
        hooks.append(fault(self, len(hooks) + 1))
        return accumulate(self, *args)

    def watched(self: Any, keep: bool = True) -> bool:
        before = state_of(self)
        kept = update(self, keep)
        if not kept:
            after = state_of(self)
            changed.extend(name for name in before if not torch.equal(before[name], after[name]))
        return kept

    Engine.accumulate, Engine.update = begin, watched  # type: ignore[method-assign]
    return train_here(run), changed


def state_of(engine: Any) -> dict[str, Tensor]:
    """Master weights, moments and what the model computes with, as this rank knows them. Collective."""
    from stablemoe_ds.checkpoint.fp32_state import MOMENTS, WEIGHT, Fp32State

    fp32, state = Fp32State(engine.deepspeed), {}
    for name, parameter in engine.model.named_parameters():
        state[name] = parameter.detach().clone()
        state |= {f"{name}/{key}": fp32.read(parameter, key).clone() for key in (WEIGHT, *MOMENTS)}
    state["steps"] = torch.tensor(fp32.steps)
    return state


def train(fault: Fault, run: RunConfig, ranks: int) -> str:
    """Train to the end; returns what the main rank printed."""
    results = run_distributed(ranks, train_with, fault, run)
    assert [changed for _, changed in results] == [[]] * ranks, "a dropped update changes nothing"
    printed: str = results[0][0]
    return printed


def faults(run: RunConfig) -> list[tuple[int, str, str]]:
    return [(line["step"], line["what"], line["where"]) for line in history(run, "fault")]


LAYOUTS = {
    "1 process, ZeRO 0": (1, 0, "fp32"),
    "1 process, ZeRO 1, bf16": (1, 1, "bf16"),
    "2 processes, ZeRO 0": (2, 0, "fp32"),
    "2 processes, ZeRO 1": (2, 1, "fp32"),
    "2 processes, ZeRO 2": (2, 2, "fp32"),
    "2 processes, ZeRO 3": (2, 3, "fp32"),
    "2 processes, ZeRO 1, bf16": (2, 1, "bf16"),
    "2 processes, ZeRO 2, bf16": (2, 2, "bf16"),
    "2 processes, ZeRO 3, bf16": (2, 3, "bf16"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_not_finite_is_dropped_and_placed(layout: str, data: TinyData, tmp_path: Path) -> None:
    ranks, stage, dtype = LAYOUTS[layout]
    run = small_run(data, tmp_path / "run", parallel={"expert": ranks, "zero_stage": stage}, precision={"dtype": dtype})
    train(partial(poison_gradient, ranks - 1, (3, 9), EXPERT), run, ranks)
    place = f"gradient of {EXPERT} on rank {ranks - 1}"
    assert faults(run) == [(n, f"update {n} dropped: the gradient is not finite", place) for n in (3, 9)]
    assert history(run, "train")[-1]["step"] == STEPS
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(checkpoint_of(run, STEPS)).values())


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_is_dropped_and_placed(data: TinyData, tmp_path: Path) -> None:
    run = small_run(data, tmp_path / "run", parallel={"micro_batch": 1})
    train(partial(poison_output, 1, (4,), NORM), run, 2)
    ((step, what, where),) = faults(run)
    assert (step, what) == (4, "update 4 dropped: the loss is nan")
    assert where == f"output of {NORM} on rank 1"


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (2, 2), (2, 3)])
def test_goes_back_and_passes_over_the_data(ranks: int, stage: int, data: TinyData, tmp_path: Path) -> None:
    """In stage 2 with two ranks, so that what was planned ahead is thrown away, too."""
    parallel = {"expert": ranks, "zero_stage": stage}
    run = small_run(
        data, tmp_path / "run", checkpoint={"every": 2, "keep": 9}, parallel=parallel, stages={"at_step": 3}
    )
    said = train(partial(poison_gradient, ranks - 1, (7, 8, 9), EXPERT), run, ranks)
    (fault,) = faults(run)
    assert fault[:2] == (
        6,
        "back from update 9 to step 6 (the gradient is not finite); "
        f"{3 * PER_STEP * 32} tokens are not read in this epoch",
    )
    assert "saved" in said
    assert [line["step"] for line in history(run, "train")] == list(range(1, STEPS + 1))


@pytest.mark.distributed
def test_goes_back_over_the_switch(data: TinyData, tmp_path: Path) -> None:
    """Weights that are wrong stay wrong, so only a checkpoint helps; the one there is knows no frozen routing."""
    run = small_run(data, tmp_path / "run", checkpoint={"every": SWITCH - 1, "keep": 9})
    run_distributed(1, train_with, partial(corrupt_weights, SWITCH + 2, math.nan), run)
    assert faults(run)[0][1].startswith(f"back from update {SWITCH + 4} to step {SWITCH - 1} (the loss is nan)")
    assert [line["stage"] for line in history(run, "train")] == [1] * SWITCH + [2] * (STEPS - SWITCH)
    assert len(history(run, "switch")) == 1
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(checkpoint_of(run, STEPS)).values())


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "stage", "dtype"), [(1, 0, "fp32"), (2, 1, "bf16"), (2, 2, "fp32"), (2, 3, "bf16")])
def test_a_spike_is_dropped(ranks: int, stage: int, dtype: str, data: TinyData, tmp_path: Path) -> None:
    run = small_run(
        data,
        tmp_path / "run",
        checkpoint={"every": 2, "keep": 9},
        parallel={"expert": ranks, "zero_stage": stage},
        precision={"dtype": dtype},
        faults={"spike_factor": 1.5, "spike_window": 3, "skip_limit": 2},
    )
    said = train(partial(corrupt_weights, 9, 30.0), run, ranks)
    assert said.startswith("small: router stablemoe"), "no library speaks before the run does"
    assert faults(run)[0][1].startswith("back from update 10 to step 8 (the loss is ")
    losses = [line["loss"] for line in history(run, "train")]
    assert max(losses) < 1.5 * losses[0]


def test_a_stop_waits_for_an_update_that_can_be_saved(data: TinyData, tmp_path: Path) -> None:
    run = small_run(data, tmp_path / "run")
    said = train(partial(stop_when_poisoned, (8, 9)), run, 1)
    assert "asked to stop: saved at step 10" in said
    assert checkpoint_of(run, 10).exists()


def test_counts_returns_to_the_same_checkpoint() -> None:
    guard = Guard(FaultsConfig(rollback_limit=2))
    assert [guard.go_back(step) for step in (5, 5, 9, 9, 9)] == [True, True, True, True, False]


def test_gives_up_with_an_error(data: TinyData, tmp_path: Path) -> None:
    run = small_run(data, tmp_path / "run", faults={"skip_limit": 2})
    with pytest.raises(AssertionError, match="there is no checkpoint to go back to"):
        run_distributed(1, train_with, partial(poison_gradient, 0, (2, 3), DENSE), run)
    run = small_run(data, tmp_path / "run", faults={"skip_limit": 2, "rollback_limit": 1}, checkpoint={"every": 1})
    with pytest.raises(AssertionError, match=r"going back to .*step-000001 has not helped"):
        run_distributed(1, train_with, partial(poison_gradient, 0, (2, 3, 4, 5), DENSE), run)


def test_a_spike_is_measured_against_the_median_of_a_full_window() -> None:
    guard = Guard(FaultsConfig(spike_factor=2.0, spike_window=3))
    for loss in (4.0, 100.0, 4.0):
        assert guard.objection(totals(loss)) is None
        guard.keep(loss)
    assert guard.objection(totals(7.9)) is None
    assert guard.objection(totals(8.1)) == "the loss is 8.1, usual was 4"
    assert Guard(FaultsConfig()).objection(totals(1e9)) is None, "off by default"
    assert guard.objection(totals(1.0, math.nan)) == "an auxiliary loss is nan"


def totals(loss: float, auxiliary: float = 0.0) -> UpdateTotals:
    """Of an update of one token."""
    return UpdateTotals(loss, auxiliary, 0.0, 1, 1, 0, 0, 0, [])


def test_a_high_drop_rate_is_said_once() -> None:
    watch = DropWatch()
    assert watch.warning(None) is None
    assert watch.warning(0.3) is None
    said = watch.warning(0.97)
    assert said is not None
    assert said.startswith("capacity drops 97% of what is routed")
    assert watch.warning(1.0) is None
