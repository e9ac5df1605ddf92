"""Trackers follow a run over its interruptions: no step twice, no second run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.run_directory.rewind import rewind
from stablemoe_ds.training.trackers import TensorBoardTracker, make_trackers
from tests.tiny import tiny_run
from tests.training.runs import TinyData, history, small_run, train_run


def events(folder: Path, name: str = "train/loss") -> list[tuple[int, float]]:
    """What TensorBoard shows of a series: (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder))
    shown.Reload()
    return [(event.step, event.value) for event in shown.Scalars(name)]


def track(folder: Path, after: int, steps: range, value: float) -> None:
    tracker = TensorBoardTracker(folder, after)
    for step in steps:
        tracker.log({"train/loss": value}, step)
    tracker.close()


@pytest.mark.parametrize(("after", "kept"), [(2, [1, 2]), (4, [1, 2, 3, 4]), (-1, [])])
def test_tensorboard_shows_each_step_once(after: int, kept: list[int], tmp_path: Path) -> None:
    track(tmp_path, -1, range(1, 5), 1.0)
    again = range(max(after, 0) + 1, 7)
    track(tmp_path, after, again, 2.0)
    assert events(tmp_path) == [(step, 1.0) for step in kept] + [(step, 2.0) for step in again]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands for W&B; what each run was begun with."""
    begun: list[dict[str, Any]] = []

    def init(**options: Any) -> Any:
        begun.append(options)
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return begun


def tracked(folder: Path) -> RunConfig:
    return tiny_run(run_dir=str(folder), logging={"wandb_project": "p", "tensorboard": False})


def test_wandb_goes_on_with_the_same_run(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    for after in (-1, 3, 2):
        rewind(tmp_path, None if after < 0 else after, None)
        (tracker,) = make_trackers(tracked(tmp_path), True, after)
        tracker.close()
    assert len({options["id"] for options in runs}) == 1
    assert all(options["resume"] == "allow" for options in runs)
    assert all(options["dir"] == str(tmp_path) for options in runs), "offline data belongs to the run as well"


def test_wandb_tells_runs_apart(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    for name in ("one", "other", "one"):
        (tmp_path / name).mkdir(exist_ok=True)
        rewind(tmp_path / name, None, None)
        make_trackers(tracked(tmp_path / name), True, -1)
    assert len({options["id"] for options in runs}) == 3, "begun from nothing, the third is not the first"


def test_only_the_first_rank_tracks(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    assert make_trackers(tracked(tmp_path), False, -1) == []
    assert runs == []


def test_a_series_never_joins_perplexities_of_different_text(data: TinyData, tmp_path: Path) -> None:
    """Of some validation text every 3 updates, of all of it at the switch and at the end."""
    run = small_run(data, tmp_path / "run", logging={"eval_every": 3, "tensorboard": True})
    train_run(run)
    lines = history(run, "valid")
    folder = tmp_path / "run" / "tensorboard"
    shown = {name: [step for step, _ in events(folder, f"{name}/perplexity")] for name in ("valid", "valid_whole")}
    whole = max(line["tokens"] for line in lines)
    assert len({line["tokens"] for line in lines}) == 2
    assert shown == {
        "valid": [line["step"] for line in lines if line["tokens"] < whole],
        "valid_whole": [line["step"] for line in lines if line["tokens"] == whole],
    }
