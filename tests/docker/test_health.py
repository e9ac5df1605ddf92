"""The health check of a container, asked about a process that looks like a run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AGES = "100000000"  # minutes: other runs on this machine are of no interest


@pytest.fixture
def run_directory(tmp_path: Path) -> Iterator[Path]:
    """Of a run that a process claims to train and of which it never writes a line."""
    sleeper = "import time; print(flush=True); time.sleep(300)"
    words = ["stablemoe_ds", "train", str(ROOT / "ds_configs" / "demo.yaml"), f"run_dir={tmp_path}"]
    with subprocess.Popen([sys.executable, "-c", sleeper, *words], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield tmp_path
        process.kill()


def ask(minutes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "STABLEMOE_STALL_MINUTES": minutes}
    command = [sys.executable, str(ROOT / "docker" / "health.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_run_that_has_just_begun_is_healthy(run_directory: Path) -> None:
    told = ask(AGES)
    assert told.returncode == 0, told.stderr
    assert f"{run_directory}: last sign of life" in told.stdout


def test_a_run_that_writes_nothing_is_not(run_directory: Path) -> None:
    assert ask("0").returncode == 1


def test_a_line_in_the_log_is_a_sign_of_life(run_directory: Path) -> None:
    log = run_directory / "metrics.jsonl"
    log.touch()
    os.utime(log, (2**32, 2**32))  # far in the future: less than no minutes ago
    assert f"{run_directory}: last sign of life -" in ask(AGES).stdout
