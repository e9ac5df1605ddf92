"""Runs that SLURM starts, stops, loses and starts again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.rehearsal import END_SECONDS, EVERY, STABLEMOE, START_SECONDS, STEPS, Rehearsal, two_rank_run
from tests.cluster.slurm import Slurm
from tests.training.runs import TinyData, history, small_run

pytestmark = pytest.mark.cluster

SLURM: dict[str, Any] = {"launcher": "slurm", "slurm": {"partition": "main", "time": "10:00"}}


@pytest.fixture
def tiny(data: TinyData, tmp_path: Path) -> Rehearsal:
    return Rehearsal(two_rank_run(data, tmp_path / "run"), {**SLURM, "restarts": 2}, tmp_path)


def test_preempted_run_saves_requeues_and_finishes(
    three_nodes: Slurm, tiny: Rehearsal, uninterrupted: list[dict[str, Any]]
) -> None:
    [job] = tiny.submit(three_nodes)
    tiny.wait_for_update(EVERY + 5)
    three_nodes.login.run("scancel", "--batch", "--signal=USR1", job)
    tiny.wait_for_evidence("asked to stop: saved at step", START_SECONDS)
    saved = tiny.saved()
    assert f"asked to stop: saved at step {saved};" in tiny.evidence()
    assert EVERY + 5 <= saved < STEPS
    ended = three_nodes.wait_for(job, "COMPLETED", END_SECONDS, tiny.evidence)
    assert ended["Restarts"] == "1"
    assert tiny.continued() == saved
    assert history(tiny.run) == uninterrupted


def test_status_asks_the_queue(three_nodes: Slurm, data: TinyData, tmp_path: Path) -> None:
    tiny = Rehearsal(two_rank_run(data, tmp_path / "run", steps=100_000), SLURM, tmp_path)
    [job] = tiny.submit(three_nodes)
    tiny.wait_for_update(EVERY)
    state = json.loads(three_nodes.login.run(*STABLEMOE, "status", tiny.run.directory, "--json"))[0]
    assert state["state"] == f"{job} RUNNING None n[1-2]"
    assert state["step"] >= EVERY
    three_nodes.login.run("scancel", job)
    three_nodes.wait_for(job, "CANCELLED", START_SECONDS)
    assert "CANCELLED" in three_nodes.login.run(*STABLEMOE, "status", tiny.run.directory)


def test_killed_rank_is_named_and_the_job_starts_again(
    three_nodes: Slurm, tiny: Rehearsal, uninterrupted: list[dict[str, Any]]
) -> None:
    [job] = tiny.submit(three_nodes)
    tiny.wait_for_update(EVERY + 5)
    saved = tiny.saved()
    three_nodes.nodes["n2"].kill_rank(1)
    ended = three_nodes.wait_for(job, "COMPLETED", END_SECONDS, tiny.evidence)
    assert ended["Restarts"] == "1"
    assert "rank 0 in update" in tiny.evidence()
    assert "lost contact with other ranks" in tiny.evidence()
    assert saved <= tiny.continued() < STEPS
    assert history(tiny.run) == uninterrupted


def test_crash_loop_ends(three_nodes: Slurm, data: TinyData, tmp_path: Path) -> None:
    seconds_of_cpu = "ulimit -t 2"  # the ranks are killed as they import torch
    run, cluster = two_rank_run(data, tmp_path / "run"), {**SLURM, "restarts": 2, "setup": [seconds_of_cpu]}
    doomed = Rehearsal(run, cluster, tmp_path)
    [job] = doomed.submit(three_nodes)
    ended = three_nodes.wait_for(job, "FAILED", END_SECONDS, doomed.evidence)
    assert ended["Restarts"] == "1"
    assert "2 attempts in a row" in doomed.evidence()


def test_bad_input_is_not_tried_twice(three_nodes: Slurm, data: TinyData, tmp_path: Path) -> None:
    run = small_run(data, tmp_path / "run", data={"train": str(tmp_path / "nowhere")}, parallel={"expert": 2})
    wrong = Rehearsal(run, {**SLURM, "restarts": 2}, tmp_path)
    [job] = wrong.submit(three_nodes)
    ended = three_nodes.wait_for(job, "FAILED", END_SECONDS, wrong.evidence)
    assert ended["Restarts"] == "0"
    assert ended["ExitCode"] == "2:0"
    assert "nowhere" in wrong.evidence()


@pytest.mark.parametrize(("lost", "left"), [("n1", "n[2-3]"), ("n2", "n[1,3]")], ids=["first node", "other node"])
def test_powered_off_node_is_replaced_by_the_spare(
    lost: str, left: str, three_nodes: Slurm, tiny: Rehearsal, uninterrupted: list[dict[str, Any]]
) -> None:
    [job] = tiny.submit(three_nodes)
    tiny.wait_for_update(EVERY + 5)
    saved = tiny.saved()
    three_nodes.nodes[lost].power_off()
    ended = three_nodes.wait_for(job, "COMPLETED", END_SECONDS, tiny.evidence)
    assert ended["NodeList"] == left
    assert saved <= tiny.continued() < STEPS
    assert history(tiny.run) == uninterrupted


def test_several_runs_are_one_array_whose_tasks_requeue_alone(
    three_nodes: Slurm, data: TinyData, tmp_path: Path
) -> None:
    short: dict[str, Any] = {"schedule": {"steps": 4}, "stages": {"at_step": 2}}
    crash_once = '[ "$SLURM_ARRAY_TASK_ID" = 0 ] || [ -n "${SLURM_RESTART_COUNT:-}" ] || ulimit -t 2'
    cluster = {**SLURM, "nodes": 1, "setup": [crash_once]}
    first, second = (
        Rehearsal(small_run(data, folder / "run", **short), cluster, folder)
        for folder in (tmp_path / "first", tmp_path / "second")
    )
    [job] = first.submit(three_nodes, str(second.folder / "run.yaml"))
    for task, each in enumerate((first, second)):
        ended = three_nodes.wait_for(f"{job}_{task}", "COMPLETED", END_SECONDS, each.evidence)
        assert ended["Restarts"] == str(task)
        assert each.steps() == [1, 2, 3, 4]


def test_chained_job_goes_on_where_the_first_was_stopped(
    three_nodes: Slurm, data: TinyData, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    chain = {**SLURM, "slurm": {"time": "10:00", "chain": 2, "dependency": "afterany"}}
    tiny = Rehearsal(two_rank_run(data, tmp_path / "run"), chain, tmp_path)
    first, second = tiny.submit(three_nodes)
    tiny.wait_for_update(EVERY + 5)
    assert three_nodes.job(second)["Dependency"].startswith(f"afterany:{first}")
    three_nodes.login.run("scancel", "--batch", "--signal=USR1", first)
    three_nodes.wait_for(first, "COMPLETED", START_SECONDS, tiny.evidence)
    saved = tiny.saved()
    assert three_nodes.wait_for(second, "COMPLETED", END_SECONDS, tiny.evidence)["Restarts"] == "0"
    assert tiny.continued() == saved
    assert history(tiny.run) == uninterrupted
