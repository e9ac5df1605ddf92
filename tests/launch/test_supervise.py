"""A job in the foreground: started again while it makes progress, stopped when asked, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stablemoe_ds.errors import UserError
from stablemoe_ds.launch.job import Job
from stablemoe_ds.launch.supervise import Supervisor
from stablemoe_ds.run_directory.checkpoint_files import FORMAT, write_manifest
from tests.launch.tools import alive, cluster, one_job
from tests.waiting import PATIENCE, wait_until

FAILS_AT_FIRST = """
import pathlib, sys
count = pathlib.Path("count")
tries = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(tries))
print("attempt", tries)
pathlib.Path("runs/tiny/launch/stamp/logs/rank-0.log").write_text(f"attempt {tries}")
if tries <= int(sys.argv[1]):
    sys.exit(int(sys.argv[2]))
pathlib.Path("ready").rename("runs/tiny/checkpoints")
"""
SAVES_WHEN_ASKED = """
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.3)
    pathlib.Path("saved").write_text(signal.Signals(number).name)
    sys.exit(0)
signal.signal(signal.Signals[sys.argv[1]], save)
pathlib.Path("up").touch()
time.sleep(999)
"""
LAUNCH = """
import signal, sys
from stablemoe_ds.launch.supervise import Supervisor
from tests.launch.test_supervise import job_of
sys.exit(Supervisor(job_of(*sys.argv[2:], stop=signal.Signals[sys.argv[1]])).run())
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def job_of(program: str, *arguments: str, restarts: int = 3, launcher: str = "local", **settings: Any) -> Job:
    """A job whose command is a small program instead of a launcher."""
    hosts = {"nodes": 2, "hosts": ["n1", "n2"]} if launcher == "torchrun" else {}
    job = one_job(cluster(launcher=launcher, restarts=restarts, **hosts))
    return replace(job, command=(sys.executable, "-c", program, *arguments), **settings)


def state() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("runs/tiny/launch/stamp/state.json").read_text())
    return found


def run(job: Job) -> int:
    job.write()
    return Supervisor(job).run()


def test_failures_are_started_again_until_the_run_is_finished(capfd: pytest.CaptureFixture[str]) -> None:
    job = job_of(FAILS_AT_FIRST, "2", "3", restarts=3)
    last = Path("ready/step-000004")
    last.mkdir(parents=True)
    saved_run = job.orders[0].run.model_dump(mode="json")
    write_manifest(last, {"format": FORMAT, "files": {}, "progress": {"step": 4}, "run": saved_run})
    assert run(job) == 0
    assert Path("count").read_text() == "3"
    said = capfd.readouterr().err
    assert said.count("starting again: ended with exit code 3; nothing is saved yet") == 2
    assert "not starting again: the run is finished" in said
    assert state() == {"state": "finished", "exit_code": 0, "attempt": 2}


def test_a_crash_loop_ends(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(job_of(FAILS_AT_FIRST, "99", "3", restarts=2)) == 3
    assert Path("count").read_text() == "2"
    assert "2 attempts in a row have added none (limit 2)" in capfd.readouterr().err
    assert state() == {"state": "failed", "exit_code": 3, "attempt": 1}


@pytest.mark.parametrize(("code", "restarts"), [("2", 5), ("3", 0)], ids=["bad input", "no restarts"])
def test_is_not_started_again(code: str, restarts: int) -> None:
    assert run(job_of(FAILS_AT_FIRST, "99", code, restarts=restarts)) == int(code)
    assert Path("count").read_text() == "1"


@pytest.mark.parametrize("restarts", [0, 3])
def test_ranks_that_were_asked_to_stop_by_others_are_not_started_again(restarts: int) -> None:
    """Under torchrun on several machines only one supervisor gets the Ctrl-C; all ranks save and exit with 0."""
    job = job_of("open('count', 'a').write('x')", restarts=restarts, launcher="torchrun")
    job.write()
    supervisor = Supervisor(job)
    assert supervisor.run() == 0
    assert Path("count").read_text() == "x"
    assert supervisor.stopped
    assert state()["state"] == "stopped"


def test_bad_input_under_torchrun_is_known_by_the_word_of_a_rank() -> None:
    """torchrun ends with 1 whatever its ranks ended with."""
    word = Path("runs/tiny/launch/fault-0001.txt")
    program = "import pathlib, sys; open('count', 'a').write('x'); pathlib.Path(sys.argv[1]).{}; sys.exit(1)"
    refused = "write_text('rank 1 before the first update: bad input: no such corpus')"
    assert run(job_of(program.format(refused), str(word), launcher="torchrun")) == 2
    assert Path("count").read_text() == "x"
    assert word.exists()
    shutil.rmtree("runs/tiny/launch/stamp")
    again = job_of(program.format("exists()"), str(word), launcher="torchrun", restarts=2)
    assert run(again) == 1, "the word is of an attempt before"


def test_under_torchrun_every_host_counts_its_own_attempts() -> None:
    attempts = Path("runs/tiny/launch/attempts.jsonl")
    attempts.parent.mkdir(parents=True)
    attempts.write_text(3 * '{"step": 0, "exit_code": 3, "host": "another"}\n')
    assert run(job_of(FAILS_AT_FIRST, "99", "3", restarts=2, launcher="torchrun")) == 3
    assert Path("count").read_text() == "2"
    assert json.loads(attempts.read_text().splitlines()[-1])["host"] == socket.gethostname()


def test_death_by_a_signal_has_a_status() -> None:
    assert run(job_of("import os; os.kill(os.getpid(), 9)", restarts=0)) == 137


def test_logs_of_an_attempt_are_kept() -> None:
    run(job_of(FAILS_AT_FIRST, "99", "3", restarts=2))
    logs = Path("runs/tiny/launch/stamp")
    assert (logs / "logs.attempt-0" / "rank-0.log").read_text() == "attempt 1"
    assert (logs / "logs" / "rank-0.log").read_text() == "attempt 2"


def test_rank_0_is_shown_where_the_command_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    program = "open('runs/tiny/launch/stamp/logs/rank-0.log', 'w').write('from the log')"
    run(job_of(program, restarts=0, tail=True))
    assert "from the log" in capfd.readouterr().out


def test_a_program_that_is_not_there_is_named() -> None:
    job = replace(job_of(""), command=("no-such-launcher",))
    job.write()
    with pytest.raises(UserError, match=r"cannot start no-such-launcher: .*; is it installed and on PATH"):
        Supervisor(job).run()


def test_what_a_launcher_leaves_behind_is_ended() -> None:
    child = (
        "import pathlib, os, time; pathlib.Path('new').write_text(str(os.getpid())); "
        "pathlib.Path('new').rename('child'); time.sleep(999)"
    )
    parent = (
        "import pathlib, subprocess, sys, time; "
        f'subprocess.Popen([sys.executable, "-c", {child!r}])\n'
        "while not pathlib.Path('child').exists(): time.sleep(0.02)"
    )
    run(job_of(parent, restarts=0))
    pid = int(Path("child").read_text())
    wait_until("the child is gone", lambda: not alive(pid))


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_request_to_stop_becomes_what_makes_the_ranks_save(sent: str) -> None:
    for stop in ("SIGUSR1", "SIGTERM"):
        job_of("").write()
        launch = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, stop, SAVES_WHEN_ASKED, stop],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        try:
            wait_until("the rank is up", lambda: Path("up").exists())
            launch.send_signal(signal.Signals[sent])
            assert launch.wait(PATIENCE) == 0
        finally:
            launch.kill()
        assert Path("saved").read_text() == stop
        assert state()["state"] == "stopped"
        assert not Path("runs/tiny/launch/attempts.jsonl").exists(), "who is asked to stop does not start again"
        subprocess.run(["rm", "-r", "saved", "up", "runs"], check=True)
