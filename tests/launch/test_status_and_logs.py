"""What ``stablemoe status`` and ``stablemoe logs`` say of a launch, by what it has left on disk."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from stablemoe_ds.errors import UserError
from stablemoe_ds.launch.logs import Tail, rank_logs, rank_of, require_logs, set_aside
from stablemoe_ds.launch.status import logs_of, render, run_directories, status
from stablemoe_ds.launch.supervise import note_state
from stablemoe_ds.run_directory.progress import newest_launch
from tests.launch.tools import cluster, one_job, run_script, stubbed

RUN = Path("runs/tiny")
FOLDER = RUN / "launch" / "stamp"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("path", "rank"),
    [
        ("logs/rank-12.log", 12),
        ("logs/rank-3.attempt-1.log", 3),
        ("logs/rank-3.attempt-1.4711.log", 3),
        ("logs/20260101120000_rank7.log", 7),
        ("logs/rank.prterun-node-4711@1.05.out", 5),
        ("logs/rank/rank.07/stdout", 7),
        ("logs/tiny_x1/attempt_0/2/stderr.log", 2),
        ("logs/job.out", None),
    ],
)
def test_every_launchers_logs_are_known(path: str, rank: int | None) -> None:
    assert rank_of(path) == rank


def launched(**settings: Any) -> None:
    one_job(cluster(launcher="local", **settings)).write()


def test_tail_gives_what_is_new_and_outlives_a_restart() -> None:
    launched()
    logs = FOLDER / "logs"
    (logs / "rank-0.log").write_bytes(b"one ")
    (logs / "rank-1.log").write_bytes(b"not of rank 0")
    tail = Tail(logs, 0)
    assert list(tail.new()) == [b"one "]
    assert list(tail.new()) == []
    with (logs / "rank-0.log").open("ab") as log:
        log.write(b"two ")
    set_aside(logs, 0)
    (logs / "rank-0.log").write_bytes(b"three")
    assert sorted(tail.new()) == [b"three", b"two "]


def test_logs_of_earlier_attempts_come_first() -> None:
    launched()
    logs = FOLDER / "logs"
    (logs / "rank-0.log").write_text("old")
    os.utime(logs / "rank-0.log", (1, 1))
    set_aside(logs, 0)
    (logs / "rank-0.log").write_text("new")
    assert [path.read_text() for path in rank_logs(logs, 0)] == ["old", "new"]


def test_a_rank_without_a_log_is_named() -> None:
    launched()
    with pytest.raises(UserError, match="no log of rank 5: no rank has started yet"):
        require_logs(FOLDER / "logs", 5)
    for rank in (0, 1):
        (FOLDER / "logs" / f"rank-{rank}.log").touch()
    with pytest.raises(UserError, match="no log of rank 5: there are logs of ranks 0 to 1"):
        require_logs(FOLDER / "logs", 5)


def test_logs_can_be_elsewhere(tmp_path: Path) -> None:
    launched(log_dir=str(tmp_path / "elsewhere"), working_directory=str(tmp_path))
    assert logs_of(RUN) == tmp_path / "elsewhere" / "tiny" / "stamp"


def test_run_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing was launched here"):
        run_directories(None)
    with pytest.raises(UserError, match="no such run directory"):
        run_directories("runs/tiny")
    launched()
    assert run_directories(None) == run_directories("runs/tiny") == [RUN]
    assert run_directories(str(FOLDER / "run.yaml")) == [RUN]
    (tmp_path / "other").mkdir()
    assert newest_launch(tmp_path / "other") is None
    with pytest.raises(UserError, match="was it started with stablemoe launch"):
        logs_of(tmp_path / "other")


@pytest.mark.parametrize(
    ("noted", "told"),
    [
        ({}, "written, not started by launch"),
        ({"state": "running", "pid": os.getpid(), "host": socket.gethostname()}, "running"),
        ({"state": "running", "pid": 2**22 + 1, "host": socket.gethostname()}, "gone without a word"),
        ({"state": "running", "pid": 1, "host": "node7"}, "running on node7, last it said"),
        ({"state": "failed", "exit_code": 3}, "failed with 3"),
        ({"state": "stopped", "exit_code": 0}, "stopped"),
    ],
)
def test_state_of_a_launch_in_the_foreground(noted: dict[str, Any], told: str) -> None:
    launched()
    if noted:
        note_state(FOLDER, **noted)
    assert status(RUN)["state"] == told


def test_how_far_it_is() -> None:
    launched()
    lines = [{"step": step, "kind": "train", "loss": 9.0 - step, "tokens_per_second": 1000.0} for step in (1, 2)]
    broken = '{"step": 3, "kind": "tr'
    text = "\n".join([*map(json.dumps, lines), json.dumps({"step": 2, "kind": "valid", "loss": 1.0}), broken])
    (RUN / "metrics.jsonl").write_text(text)
    (RUN / "launch" / "attempts.jsonl").write_text('{"step": 0, "exit_code": 3}\n')
    facts = status(RUN)
    assert (facts["step"], facts["steps"], facts["loss"]) == (2, 4, 7.0)
    assert (facts["attempts_ended"], facts["last_exit_code"], facts["checkpoint_step"]) == (1, 3, None)
    heads, line = (re.split(r"  +", text.strip()) for text in render([facts]).splitlines())
    assert heads == ["run", "state", "launcher", "step", "loss", "tokens/s", "checkpoint", "attempts", "launch"]
    assert line[3:] == ["2 of 4", "7.0000", "1,000", "–", "1, the last exited with 3", str(FOLDER)]


def test_runs_stand_below_each_other_and_what_is_not_known_is_a_dash() -> None:
    launched()
    line = {"step": 3, "kind": "train", "loss": None, "tokens_per_second": 1000.0}
    (RUN / "metrics.jsonl").write_text(json.dumps(line))
    never = Path("runs/never")
    never.mkdir()
    (never / "metrics.jsonl").write_text(json.dumps({"step": 12, "kind": "train", "loss": 2.5}))
    heads, first, second = render([status(RUN), status(never)]).splitlines()
    assert heads.split() == ["run", "state", "launcher", "step", "loss", "tokens/s", "checkpoint", "launch"]
    written = ["tiny", "written, not started by launch", "local", "3 of 4", "–", "1,000", "–", str(FOLDER)]
    assert re.split(r"  +", first) == written
    assert re.split(r"  +", second) == ["never", "not launched", "–", "12 of ?", "2.5000", "–", "–", "runs/never"]
    ends = {text.index(cell) + len(cell) for text, cell in ((heads, "step"), (first, "3 of 4"), (second, "12 of ?"))}
    assert len(ends) == 1  # numbers are flush right


@pytest.mark.parametrize(
    ("squeue", "sacct", "told"),
    [
        ("echo '7 RUNNING  None n[1-2]'", "exit 1", "7 RUNNING None n[1-2]"),
        ("exit 1", "echo '7 COMPLETED 0:0'", "7 COMPLETED 0:0"),
        ("exit 1", "exit 1", "not in the queue any more"),
    ],
)
def test_state_of_a_submitted_job(
    squeue: str, sacct: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_script(one_job(cluster()), tmp_path)
    environment = stubbed(tmp_path)
    for name, does in (("squeue", squeue), ("sacct", sacct)):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", environment["PATH"])
    assert status(RUN)["state"] == "written, not submitted by launch"
    note_state(FOLDER, state="submitted", job_ids=["7"])
    assert (status(RUN)["state"], status(RUN)["job_ids"]) == (told, ["7"])
