"""Ranks on one machine, without a launcher of anybody else's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.runs import TinyData, history, run_file, small_run, tiny_data
from tests.waiting import PATIENCE, wait_until

RANKS = [sys.executable, "-m", "stablemoe_ds.launch.local", "--processes", "2", "--port", "29511", "--logs", "logs"]
SPEAKS = (
    "import os; print(*(os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')))"
)
FAILS_AFTER_RANK_1 = """
import os, pathlib, sys, time
pid = pathlib.Path("pid")
if os.environ["RANK"] == "1":
    pid.write_text(str(os.getpid()))
    sys.exit(4)
while not (pid.exists() and pid.read_text()) or pathlib.Path("/proc", pid.read_text()).exists():
    time.sleep(0.02)  # until the launcher has taken note of its end
sys.exit(3)
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ranks(program: str) -> subprocess.CompletedProcess[str]:
    command = [*RANKS, sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_ranks_know_who_they_are_and_rank_0_is_shown() -> None:
    done = ranks(SPEAKS)
    assert done.returncode == 0
    assert done.stdout == "0 0 2 127.0.0.1 29511\n"
    assert Path("logs/rank-0.log").read_text() == "0 0 2 127.0.0.1 29511\n"
    assert Path("logs/rank-1.log").read_text() == "1 1 2 127.0.0.1 29511\n"


def test_status_is_that_of_the_rank_that_failed_first() -> None:
    assert ranks(FAILS_AFTER_RANK_1).returncode == 4


def test_a_rank_whose_peer_has_failed_is_ended() -> None:
    done = ranks("import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(999)")
    assert done.returncode == 3


def test_a_killed_rank_has_a_status() -> None:
    assert ranks("import os; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9)").returncode == 137


def test_a_program_that_is_not_there_is_bad_input() -> None:
    done = subprocess.run([*RANKS, "no-such-program"], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert "there is no program no-such-program" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_every_request_reaches_every_rank(number: signal.Signals) -> None:
    arrives = signal.SIGUSR1 if number == signal.SIGINT else number
    program = (
        "import os, pathlib, signal, sys, time\n"
        f"signal.signal({int(arrives)}, lambda *_: sys.exit(0))\n"
        "pathlib.Path('up' + os.environ['RANK']).touch()\n"
        "time.sleep(999); sys.exit(9)"
    )
    process = subprocess.Popen([*RANKS, sys.executable, "-c", program])
    try:
        wait_until("both ranks are up", lambda: Path("up0").exists() and Path("up1").exists())
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return tiny_data(tmp_path_factory.getbasetemp() / "tiny-data")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_launch_trains_on_two_processes_and_tells_about_it(data: TinyData, tmp_path: Path) -> None:
    sharded = {"parallel": {"expert": 2, "zero_stage": 3, "offload": "all"}, "precision": {"dtype": "bf16"}}
    run = small_run(data, Path("runs/small"), **sharded, checkpoint={"every": 6})
    (tmp_path / "cluster.yaml").write_text("launcher: local\ndevice: cpu\nprocesses_per_node: 2\n")
    stablemoe = [sys.executable, "-m", "stablemoe_ds"]
    command = [*stablemoe, "launch", run_file(run, tmp_path / "run.yaml"), "--cluster", "cluster.yaml"]
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not starting again: the run is finished: all 12 updates are made" in done.stderr
    assert [line["step"] for line in history(run, "train")] == list(range(1, 13))
    told = subprocess.run([*stablemoe, "status"], capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    assert re.split(r"  +", told.splitlines()[1])[:4] == ["small", "finished", "local", "12 of 12"]
    said = subprocess.run(
        [*stablemoe, "logs", "runs/small"], capture_output=True, text=True, check=True, timeout=PATIENCE
    ).stdout
    assert "step 12/12" in said
