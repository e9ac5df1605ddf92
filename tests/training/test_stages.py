"""When stage 1 ends, and what is said of a table that should not have been frozen yet."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stablemoe_ds.config.schema import StagesConfig
from stablemoe_ds.training.stages import RoutingState, StageSchedule, switch_warnings
from tests.tiny import tiny_run
from tests.training.runs import TinyData, history, small_run, train_run

STEPS = 100


def schedule(**stages: Any) -> StageSchedule:
    return StageSchedule(tiny_run(schedule={"steps": STEPS}, stages=stages))


def first_due(stages: StageSchedule, states: list[RoutingState]) -> int | None:
    """The first update of stage 2 in a run whose records are ``states``."""
    for step in range(STEPS):
        if stages.due(step, [state for state in states if state.step <= step]):
            return step
    return None


def records(every: int = 5, **series: Any) -> list[RoutingState]:
    """A record every few updates; a series is a function of the step, and level unless given."""
    level = {"agreement": lambda _: 0.9, "churn": lambda _: 0.02, "load": lambda _: 1.5}
    shape = {**level, **series}
    return [RoutingState(step, **{name: f(step) for name, f in shape.items()}) for step in range(every, STEPS, every)]


@pytest.mark.parametrize(
    ("stages", "planned"), [({"at_step": 37}, 37), ({"at_fraction": 0.25}, 25), ({"at_fraction": 0.333}, 33)]
)
def test_known_beforehand(stages: dict[str, Any], planned: int) -> None:
    assert schedule(**stages).planned == planned
    assert first_due(schedule(**stages), records()) == planned


def test_never() -> None:
    assert schedule(never=True).planned is None
    assert first_due(schedule(never=True), records()) is None


def test_dense_model_has_no_stage_2() -> None:
    dense = StageSchedule(tiny_run(moe={"router": "dense", "layers": []}))
    assert not any(dense.due(step, []) for step in range(STEPS))


PLATEAU = {"window": 20, "tolerance": 0.05, "earliest": 0.1, "latest": 0.8}


def ramp(until: int, rate: float) -> Any:
    """Moves at ``rate`` an update and is level from ``until`` on."""
    return lambda step: 0.1 + rate * min(step, until)


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        ({}, 25),  # level from the first record, 5, on: a window later
        ({"agreement": ramp(40, 0.01)}, 55),  # 0.45 at 35 is within 0.05 of 0.5
        ({"churn": ramp(40, 0.01)}, 55),
        ({"load": ramp(40, 0.1)}, 60),  # relative: 3.6 at 35 is more than 5 % below 4.1
        ({"agreement": ramp(STEPS, 0.01)}, 80),  # still moving: forced by the bound
        ({"load": lambda step: 3.0 if step % 10 else 1.0}, 80),  # restless, if level on average
        ({"agreement": ramp(STEPS, 0.0001)}, 25),  # slower than the tolerance
    ],
    ids=["level", "agreement", "churn", "load", "moving", "restless", "slow"],
)
def test_plateau(series: dict[str, Any], expected: int) -> None:
    assert schedule(plateau=PLATEAU).planned is None
    assert first_due(schedule(plateau=PLATEAU), records(**series)) == expected


def test_plateau_waits_for_the_earliest_moment() -> None:
    assert first_due(schedule(plateau={**PLATEAU, "earliest": 0.6}), records()) == 60


def test_plateau_needs_three_records_and_a_whole_window() -> None:
    assert first_due(schedule(plateau=PLATEAU), records(every=30)) == 80, "never three records in 20 updates"
    assert first_due(schedule(plateau=PLATEAU), []) == 80
    assert first_due(schedule(plateau={**PLATEAU, "window": 60}), records()) == 65


NUMBERS = "agreement 31.0%, max/mean load 6.40 (token frequencies allow 1.30)"


def test_warnings_name_both_numbers() -> None:
    assert switch_warnings(0.9, 1.4, 1.3, StagesConfig()) == []
    (routers,) = switch_warnings(0.31, 1.4, 1.3, StagesConfig())
    assert "agreement 31.0%, max/mean load 1.40 (token frequencies allow 1.30)" in routers
    (load,) = switch_warnings(0.9, 6.4, 1.3, StagesConfig())
    assert "out of balance" in load
    assert "agreement 90.0%, max/mean load 6.40 (token frequencies allow 1.30)" in load
    both = switch_warnings(0.31, 6.4, 1.3, StagesConfig())
    assert len(both) == 2
    assert all(NUMBERS in text for text in both)


def test_warnings_begin_at_the_bounds() -> None:
    stages = StagesConfig(min_agreement=0.5, max_load_excess=2.0)
    assert switch_warnings(0.5, 2.6, 1.3, stages) == []
    assert len(switch_warnings(0.499, 2.61, 1.3, stages)) == 2


def test_a_switch_far_too_early_warns(data: TinyData, tmp_path: Path) -> None:
    run = small_run(data, tmp_path / "run", stages={"at_step": 1}, schedule={"steps": 2})
    said = train_run(run)
    (switch,) = history(run, "switch")
    warning = next(line for line in said.splitlines() if line.startswith("WARNING: the distilled router"))
    found = re.search(r"agreement (\S+)%, max/mean load (\S+) \(token frequencies allow (\S+)\)", warning)
    assert found
    logged = (switch["agreement"] * 100, switch["load"], switch["least_load"])
    assert [float(number) for number in found.groups()] == pytest.approx(logged, abs=0.06)


def test_a_run_that_stays_in_stage_1(data: TinyData, tmp_path: Path) -> None:
    run = small_run(data, tmp_path / "run", stages={"at_step": None, "never": True}, schedule={"steps": 4})
    said = train_run(run)
    assert "one stage" in said
    assert "WARNING" not in said
    assert {line.get("stage", 1) for line in history(run)} == {1}
    assert not (tmp_path / "run" / "routing_table.safetensors").exists()
